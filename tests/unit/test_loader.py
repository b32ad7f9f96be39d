"""The loader that training uses: the bits of the simple way in any threads and processes, in bounded memory."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import kaldiio
import numpy as np
import pytest
import torch

from sdumc.data.batches import BatchLoader, GlobalBatchSampler, UtteranceDataset, _Blocks, collate
from sdumc.data.dump import all_finite, load_dump
from sdumc.data.shards import ShardWriter, merge_shards
from sdumc.data.tables import read_table, write_table
from sdumc.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
UTTS = [f"u{k:03d}" for k in range(120)]
NAMES = ("audio", "text", "video")


@pytest.fixture(scope="module")
def dump(tmp_path_factory) -> Path:
    """Three features in three archives each: float32 with absences, doubles and compressed matrices from elsewhere."""
    folder = tmp_path_factory.mktemp("dump")
    rng = np.random.default_rng(0)
    for job in (1, 2, 3):
        with ShardWriter(folder, "audio", job, {}) as writer:
            for k, utt in list(enumerate(UTTS))[job - 1 :: 3]:
                if k % 7 == 3 or k < 5:
                    writer.absent(utt, "none")
                else:
                    writer.write(utt, rng.normal(size=(rng.integers(1, 60), 16)))
    merge_shards(folder, "audio", 3, {}, UTTS)
    for name, dim, options in (("text", 8, {}), ("video", 5, {"compression_method": 2})):
        dtype = np.float32 if options else np.float64
        values = {u: rng.normal(size=(rng.integers(1, 20), dim)).astype(dtype) for u in UTTS}
        kaldiio.save_ark(str(folder / f"{name}.ark"), values, scp=str(folder / f"{name}.scp"), **options)
    write_table(folder / "utt2label", {u: k % 7 - 3 for k, u in enumerate(UTTS)})
    return folder


def dataset_of(folder: Path) -> UtteranceDataset:
    return UtteranceDataset(load_dump(folder), NAMES)


def sampler_of(dataset: UtteranceDataset, **options) -> GlobalBatchSampler:
    return GlobalBatchSampler(dataset.frames, 16, 700, seed=3, **options)


def bits(batch) -> tuple:
    """All of a batch, for comparison to the bit."""
    features = {n: (tuple(x.shape), x.numpy().tobytes()) for n, x in batch.features.items()}
    return batch.ids, batch.labels.numpy().tobytes(), features, {n: x.tolist() for n, x in batch.lengths.items()}


def simple_way(dataset: UtteranceDataset, sampler) -> list[tuple]:
    return [bits(collate([dataset[i] for i in indices])) for indices in sampler]


@pytest.mark.parametrize(("workers", "prefetch"), [(0, 1), (1, 1), (2, 2), (5, 3)])
def test_the_bits_are_those_of_the_simple_way(dump, workers, prefetch):
    dataset = dataset_of(dump)
    sampler = sampler_of(dataset)
    loader = BatchLoader(dataset, sampler, workers, prefetch)
    assert len(loader) == len(sampler) > 5
    for epoch in range(3):  # the memory of earlier batches, full of their values, is used again
        sampler.set_epoch(epoch)
        assert [bits(batch) for batch in loader] == simple_way(dataset, sampler)


def test_batches_without_a_modality_and_without_utterances(dump):
    dataset = dataset_of(dump)
    batches = [[0, 1, 2], [], [3], list(range(20))]
    assert [bits(b) for b in BatchLoader(dataset, batches)] == simple_way(dataset, batches)
    assert next(iter(BatchLoader(dataset, [[0, 1]]))).features["audio"].shape == (2, 1, 16)


def test_ranks_read_shares_of_the_same_batches_and_go_on_in_the_middle(dump):
    dataset = dataset_of(dump)
    alone = list(BatchLoader(dataset, sampler_of(dataset)))
    shares = [list(BatchLoader(dataset, sampler_of(dataset, world_size=3, rank=r))) for r in range(3)]
    for i, batch in enumerate(alone):
        assert [share[i].ids for share in shares] == [batch.ids[r::3] for r in range(3)]
    loader = BatchLoader(dataset, sampler_of(dataset))
    loader.sampler.start_batch = 4
    assert [b.ids for b in loader] == [b.ids for b in alone[4:]]


def test_memory_is_used_again_but_not_while_anything_looks_at_it(dump):
    dataset = dataset_of(dump)
    indices = list(range(30))
    loader = BatchLoader(dataset, [indices] * 12, num_workers=2, prefetch=2)
    expected = simple_way(dataset, [indices])[0]
    held, places = [], set()
    for i, batch in enumerate(loader):
        places.add(batch.features["audio"].data_ptr())
        if i % 5 == 0:  # keep a view of a view only, as autograd or a plot would
            held.append((batch.features["text"][3:, 1:].numpy()[:, ::2], expected[2]["text"]))
    assert len(places) < 9
    del batch
    for _ in range(3):
        for batch in loader:
            assert bits(batch) == expected
    for view, (shape, raw) in held:
        np.testing.assert_array_equal(view, np.frombuffer(raw, np.float32).reshape(shape)[3:, 1:][:, ::2])


def test_blocks_are_private_begin_at_a_page_and_are_let_go():
    blocks = _Blocks(keep=2)
    first = blocks.take(1000)
    place = first.data_ptr()
    assert place % os.sysconf("SC_PAGESIZE") == 0
    view = first[5:].view(5, 199)
    del first
    second = blocks.take(1000)
    assert second.data_ptr() != place  # `view` is alive
    del view
    assert blocks.take(900).data_ptr() == place  # and dies here again
    assert blocks.take(10).data_ptr() != place  # not for a small one
    for size in (3000, 4000, 5000, 100000, 7):
        blocks.take(size)
    assert len(blocks._free) <= 4
    second.fill_(1)
    child = os.fork()
    if child == 0:
        second.fill_(2)
        os._exit(0)
    os.waitpid(child, 0)
    assert (second == 1).all()
    gone = weakref.ref(blocks)
    del blocks
    assert gone() is None and second.sum() == 1000


def _epochs(folder: Path, results) -> None:
    try:
        dataset = dataset_of(folder)
        sampler = sampler_of(dataset)
        loader = BatchLoader(dataset, sampler, 2)
        made = [[bits(batch) for batch in loader] for _ in range(4)]
        results.put(made == [simple_way(dataset, sampler)] * 4)
    except BaseException as e:
        results.put(repr(e))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_processes_forked_or_spawned_while_threads_read(dump, method):
    """Cached file handles, shared by forked processes, are what returns wrong data elsewhere."""
    context = multiprocessing.get_context(method)
    dataset = dataset_of(dump)
    sampler = sampler_of(dataset)
    expected = simple_way(dataset, sampler)
    loader = BatchLoader(dataset, sampler, 2)
    running = iter(loader)
    seen = [bits(next(running))]
    results = context.Queue()
    children = [context.Process(target=_epochs, args=(dump, results)) for _ in range(3)]
    for child in children:
        child.start()
    seen += [bits(batch) for batch in running]
    for _ in range(5):
        assert [bits(batch) for batch in loader] == expected
    assert [results.get(timeout=900) for _ in children] == [True] * 3
    for child in children:
        child.join()
    assert seen == expected


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_dataset_in_worker_processes_of_torch(dump, method):
    dataset = dataset_of(dump)
    sampler = sampler_of(dataset)
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=sampler, collate_fn=collate, num_workers=2, multiprocessing_context=method
    )
    assert [bits(batch) for batch in loader] == simple_way(dataset, sampler)


def test_the_dataset_can_be_pickled(dump):
    dataset = dataset_of(dump)
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[9].features["audio"], dataset[9].features["audio"])


def with_bad_audio(folder: Path, target: Path, values: np.ndarray) -> Path:
    for name in NAMES:
        table = read_table(folder / f"{name}.scp")
        if name == "audio":
            kaldiio.save_ark(str(target / "bad.ark"), {"u020": values, "u021": np.ones((3, 16), np.float32)})
            table["u020"] = f"{target / 'bad.ark'}:5"
        write_table(target / f"{name}.scp", table)
    for name in ("utt2label", "audio.absent", "audio.frames"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("bad", ["nan", "inf", "frames", "dim", "cut", "gone"])
def test_errors_are_those_of_the_dataset(dump, tmp_path, bad, workers):
    frames = int(read_table(dump / "audio.frames")["u020"])
    values = np.zeros((frames + (bad == "frames"), 17 if bad == "dim" else 16), np.float32)
    values[-1, -1] = {"nan": np.nan, "inf": -np.inf}.get(bad, 0)
    folder = with_bad_audio(dump, tmp_path, values)
    if bad == "dim":
        folder = with_bad_audio(dump, tmp_path, np.zeros((frames, 16), np.float32))
    dataset = dataset_of(folder)
    if bad == "dim":
        with_bad_audio(dump, tmp_path, values)
    elif bad == "cut":
        os.truncate(tmp_path / "bad.ark", 30)
    elif bad == "gone":
        (tmp_path / "bad.ark").unlink()
    with pytest.raises(UserError) as direct:
        dataset[20]
    threads = threading.active_count()
    with pytest.raises(UserError) as error:
        list(BatchLoader(dataset, [[8, 9], [19, 20, 22], [23]], workers))
    assert str(error.value) == str(direct.value) and "'u020'" in str(error.value)
    del error
    gc.collect()
    assert threading.active_count() == threads


def test_leaving_in_the_middle_ends_the_threads(dump):
    threads = threading.active_count()
    for i, _batch in enumerate(BatchLoader(dataset_of(dump), [list(range(40))] * 10, 3)):
        if i == 2:
            break
    gc.collect()
    assert threading.active_count() == threads


def test_wrong_arguments(dump):
    for options in ({"num_workers": -1}, {"prefetch": 0}):
        with pytest.raises(ValueError):
            BatchLoader(dataset_of(dump), [[0]], **options)


@pytest.mark.filterwarnings("error")
def test_all_finite():
    big = np.full((3, 5), 3e38, np.float32)  # its sum overflows
    assert all_finite(big) and all_finite(-big) and all_finite(np.zeros((0, 4), np.float32))
    for value in (np.nan, np.inf, -np.inf):
        for matrix in (big, np.zeros((3, 5), np.float32)):
            bad = matrix.copy()
            bad[1, 2] = value
            assert not all_finite(bad)
    assert not all_finite(np.array([[np.inf, -np.inf]], np.float32))


PEAK_OF_TWO_EPOCHS = """
import sys
from sdumc.data.batches import UtteranceDataset
from sdumc.data.dump import load_dump
from sdumc.data.batches import BatchLoader
from sdumc.data.batches import GlobalBatchSampler

dataset = UtteranceDataset(load_dump(sys.argv[1]), ["audio"])
loader = BatchLoader(dataset, GlobalBatchSampler(dataset.frames, 8))
for _ in range(2):
    for batch in loader:
        pass
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Resident memory over a corpus of 8 MB and one of 160 MB, batches of the same size."""
    peaks = []
    for count in (20, 400):
        folder = tmp_path / str(count)
        utts = [f"u{k:04d}" for k in range(count)]
        with ShardWriter(folder, "audio", 1, {}) as writer:
            for utt in utts:
                writer.write(utt, np.ones((400, 256), np.float32))
        merge_shards(folder, "audio", 1, {}, utts)
        write_table(folder / "utt2label", dict.fromkeys(utts, 1))
        command = [sys.executable, "-c", PEAK_OF_TWO_EPOCHS, str(folder)]
        run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        peaks.append(int(run.stdout) / 1024)
    assert abs(peaks[1] - peaks[0]) < 20


def test_the_benchmark_reads_the_same_on_every_side(tmp_path):
    from sdumc.bench import loader as bench

    bench.generate(tmp_path, 6)
    dump = load_dump(tmp_path, bench.NAMES)
    dataset = UtteranceDataset(dump, bench.NAMES)
    (plain,) = bench.plain_batches(dump)
    (ours,) = BatchLoader(dataset, [range(6)])
    for name, values in plain.items():  # the order of utterances differs
        rows, own = ({row.numpy().tobytes() for row in batch} for batch in (values, ours.features[name]))
        assert rows == own and len(rows) == 6
    assert sum(len(batch) for batch in BatchLoader(dataset, bench.sampler_of(dataset))) == 6
    bench.read_raw(bench.archives(dump), bytearray(2**20))
    with pytest.raises(UserError, match="GB free"):
        bench.generate(tmp_path, 500_000)
