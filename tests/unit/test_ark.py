"""Archives: the same matrices as kaldiio both ways, jobs killed at any moment, reads from many processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import kaldiio
import numpy as np
import pytest
import yaml

from sdumc.data.dump import load_dump, load_matrix, matrix_shape, split_rxspecifier
from sdumc.data.shards import ShardWriter, merge_shards
from sdumc.data.tables import read_table
from sdumc.errors import UserError
from sdumc.files import settings_hash

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"model": "m", "layers": [-4, -3]}


def matrices(count: int = 6, dim: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"-s{k}_é": rng.normal(size=(rng.integers(1, 40), dim)).astype(np.float32) for k in range(count)}


def write_shards(directory: Path, values: dict, jobs: int = 2, name: str = "audio", settings=SETTINGS) -> None:
    for job in range(1, jobs + 1):
        utts = sorted(values)[job - 1 :: jobs]
        with ShardWriter(directory, name, job, settings, utts) as writer:
            for utt in utts:
                if utt not in writer.done:
                    writer.write(utt, values[utt])


# ---------------------------------------------------------------------------------------------------------- format


def test_kaldiio_reads_what_we_write(tmp_path):
    values = matrices()
    write_shards(tmp_path, values)
    merged = merge_shards(tmp_path, "audio", 2, {"extractor": "x"}, values)
    assert merged.dim == 5 and merged.frames == {u: len(m) for u, m in sorted(values.items())}
    theirs = kaldiio.load_scp(str(tmp_path / "audio.scp"))
    assert list(theirs) == sorted(values)
    for utt, matrix in values.items():
        np.testing.assert_array_equal(theirs[utt], matrix)
    streamed = {k: v for job in (1, 2) for k, v in kaldiio.load_ark(str(tmp_path / "ark" / f"audio.{job}.ark"))}
    for utt, matrix in values.items():
        np.testing.assert_array_equal(streamed[utt], matrix)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_we_read_what_kaldiio_writes(tmp_path, dtype):
    values = {u: m.astype(dtype) for u, m in matrices().items()}
    kaldiio.save_ark(str(tmp_path / "a.ark"), values, scp=str(tmp_path / "a.scp"))
    for utt, place in read_table(tmp_path / "a.scp").items():
        matrix = load_matrix(place)
        assert matrix.dtype == np.float32 and matrix.flags.writeable and matrix.flags.owndata
        np.testing.assert_array_equal(matrix, values[utt].astype(np.float32))
        assert matrix_shape(place) == matrix.shape


@pytest.mark.parametrize("method", range(1, 8))
def test_we_read_compressed_matrices(tmp_path, method):
    values = {u: np.clip(m, -1, 1) for u, m in matrices().items()}
    path = tmp_path / "with:colon.ark"
    kaldiio.save_ark(str(tmp_path / "a.ark"), values, scp=str(tmp_path / "a.scp"), compression_method=method)
    os.rename(tmp_path / "a.ark", path)
    for utt, place in read_table(tmp_path / "a.scp").items():
        place = f"{path}:{place.rpartition(':')[2]}"
        assert matrix_shape(place) == values[utt].shape
        matrix = load_matrix(place)
        assert matrix.dtype == np.float32 and matrix.flags.writeable
        np.testing.assert_array_equal(matrix, kaldiio.load_mat(place))


def test_offsets_and_other_specifiers():
    assert split_rxspecifier("a:b.ark:12") == ("a:b.ark", 12)
    assert split_rxspecifier("a.mat") == ("a.mat", 0)
    for bad, message in (("zcat a.gz |", "pipe"), ("a.ark:3[0:5]", "ranges")):
        with pytest.raises(UserError, match=message):
            split_rxspecifier(bad)


def test_cut_or_wrong_archives(tmp_path):
    values = matrices(3)
    write_shards(tmp_path, values, jobs=1)
    merge_shards(tmp_path, "audio", 1, {}, values)
    places = read_table(tmp_path / "audio.scp")
    last = places[max(places)]
    ark = tmp_path / "ark" / "audio.1.ark"
    raw = ark.read_bytes()
    ark.write_bytes(raw[:-1])
    for read in (load_matrix, matrix_shape):
        with pytest.raises(UserError, match=r"audio.1.ark:\d+: the archive is cut short"):
            read(last)
    ark.write_bytes(raw[: int(last.rpartition(":")[2]) + 4])
    with pytest.raises(UserError, match="cut short"):
        load_matrix(last)
    ark.write_bytes(raw)
    path, offset = split_rxspecifier(last)
    with pytest.raises(UserError, match="no Kaldi binary matrix"):
        load_matrix(f"{path}:{offset - 1}")
    with pytest.raises(UserError, match="cannot be opened"):
        load_matrix(str(tmp_path / "none.ark:5"))
    for kind in (b"\0BNPY ", b"\0BPKL", b"\0BFV \4\1\0\0\0\0\0\0\0"):  # kaldiio would unpickle one of these
        (tmp_path / "x.ark").write_bytes(kind + bytes(40))
        with pytest.raises(UserError, match="no Kaldi binary matrix"):
            load_matrix(str(tmp_path / "x.ark:0"))


# ------------------------------------------------------------------------------------------------------- bad values


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[1.0, np.nan]]), "NaN or infinite"),
        (np.array([[1.0, np.inf]]), "NaN or infinite"),
        (np.array([[1.0, 1e300]]), "NaN or infinite"),
        (np.zeros((3, 3)), "dimension 3, but 2"),
        (np.zeros((0, 2)), "no frames"),
        (np.zeros(2), "expected a matrix"),
    ],
)
def test_writer_refuses(tmp_path, array, message):
    with ShardWriter(tmp_path, "audio", 1, SETTINGS) as writer:
        writer.write("a", np.ones((2, 2)))
        with pytest.raises(UserError, match=f"utterance 'b'.*{message}"):
            writer.write("b", array)
        with pytest.raises(UserError, match="'a': given twice"):
            writer.absent("a", "x")
        with pytest.raises(UserError, match="white space"):
            writer.write("b c", np.ones((2, 2)))
    assert merge_shards(tmp_path, "audio", 1, {}, ["a"]).frames == {"a": 2}


def test_the_dimension_holds_across_a_restart(tmp_path):
    writer = ShardWriter(tmp_path, "audio", 1, SETTINGS)
    writer.write("a", np.ones((2, 2)))
    writer.commit()
    writer.close()
    with ShardWriter(tmp_path, "audio", 1, SETTINGS) as writer, pytest.raises(UserError, match="dimension 3, but 2"):
        writer.write("b", np.ones((2, 3)))


# ---------------------------------------------------------------------------------------------------------- resuming

JOB = """
import sys
import numpy as np
from sdumc.data.shards import ShardWriter
rng = np.random.default_rng(0)
values = {f"u{k:03d}": rng.normal(size=(rng.integers(1, 60), 16)) for k in range(60)}
with ShardWriter(sys.argv[1], "audio", 1, {"a": 1}, sorted(values)) as writer:
    print("done", len(writer.done), flush=True)
    for k, (utt, value) in enumerate(sorted(values.items())):
        if utt in writer.done:
            continue
        if k % 7 == 3:
            writer.absent(utt, "no sound", why="é")
        else:
            writer.write(utt, value, hyp=f"words {k}")
        if k % 4 == 0:
            writer.commit()
        print(utt, flush=True)
        sys.stdin.readline()  # goes on at a word, or without any at the end of the stream
"""


def start(directory: Path) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", JOB, str(directory)], cwd=ROOT, **pipes)


def final_files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (directory / "ark").iterdir() if not p.name.startswith(".")}


def test_killed_jobs_end_with_the_same_bytes(tmp_path):
    whole = start(tmp_path / "whole")
    whole.communicate()
    assert whole.returncode == 0
    counts = []
    for stop_after in (1, 9, 17, 26):
        job = start(tmp_path / "killed")
        counts.append(int(job.stdout.readline().split()[1]))
        for _ in range(stop_after):
            job.stdout.readline()
            print(file=job.stdin, flush=True)
        os.kill(job.pid, signal.SIGKILL)
        job.communicate()
        assert job.returncode == -signal.SIGKILL
        assert not (tmp_path / "killed" / "ark" / "audio.1.ark").exists()
    last = start(tmp_path / "killed")
    output, _ = last.communicate()
    assert last.returncode == 0 and counts == sorted(counts) and int(output.split()[1]) > 40
    assert final_files(tmp_path / "killed") == final_files(tmp_path / "whole")
    assert set(final_files(tmp_path / "whole")) == {"audio.1.ark", "audio.1.json"}


class Killed(BaseException):
    pass


def test_killed_at_each_file_operation(tmp_path, monkeypatch):
    """Stop at the n-th change of the disk, for each n, leaving also half-written tails; then go on."""
    values = matrices(5)

    def job(directory):
        writer = ShardWriter(directory, "audio", 1, SETTINGS)
        for utt in sorted(values):
            if utt not in writer.done:
                writer.write(utt, values[utt])
                writer.commit()
        writer.finish()
        writer.close()

    job(tmp_path / "whole")
    expected = final_files(tmp_path / "whole")
    real = {name: getattr(os, name) for name in ("fsync", "replace", "unlink")}
    state = {"left": None}

    def counted(name):
        def call(*args, **kwargs):
            if state["left"] == 0:
                raise Killed
            if state["left"] is not None:
                state["left"] -= 1
            return real[name](*args, **kwargs)

        return call

    for name in real:
        monkeypatch.setattr(os, name, counted(name))
    stops = 0
    for n in range(100):
        directory = tmp_path / f"stop{n}"
        # Another run's finished shard lies there already, as when a stage is redone with other settings.
        state["left"] = None
        with ShardWriter(directory, "audio", 1, {"old": True}) as writer:
            writer.write("old", np.ones((3, 5)))
        state["left"] = n
        try:
            job(directory)
        except Killed:
            stops += 1
        finished, state["left"] = state["left"] != 0, None
        for tail in directory.glob("ark/*.partial"):
            with open(tail, "ab") as f:
                f.write(b"half of a matr")
        for tail in directory.glob("ark/*.journal"):
            with open(tail, "ab") as f:
                f.write(b'{"utt": "-s9')
        for leftover in directory.glob("ark/.*.tmp"):
            leftover.unlink()
        job(directory)
        assert final_files(directory) == expected, n
        if finished:
            break
    assert stops > 10 and finished


def test_an_archive_that_lost_committed_bytes_goes_back_to_an_earlier_commit(tmp_path):
    values = matrices(4)
    writer = ShardWriter(tmp_path, "audio", 1, SETTINGS)
    for utt in sorted(values):
        writer.write(utt, values[utt])
        writer.commit()
    writer.close()
    partial = tmp_path / "ark" / "audio.1.ark.partial"
    partial.write_bytes(partial.read_bytes()[:-3])
    writer = ShardWriter(tmp_path, "audio", 1, SETTINGS)
    assert writer.done == set(sorted(values)[:3])
    writer.close()


def test_other_settings_or_another_split_start_anew(tmp_path):
    for settings, utterances, expected in (
        (SETTINGS, ["a", "b"], 0),
        (SETTINGS, ["a", "b"], 1),
        ({**SETTINGS, "model": "n"}, ["a", "b"], 0),
        ({**SETTINGS, "model": "n"}, ["a", "c"], 0),
    ):
        writer = ShardWriter(tmp_path, "audio", 1, settings, utterances)
        assert len(writer.done) == expected
        if not expected:
            writer.write("a", np.ones((2, 2)))
        writer.commit()
        writer.close()


def test_a_finished_shard_is_left_alone(tmp_path):
    values = matrices()
    write_shards(tmp_path, values, jobs=1)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "ark").iterdir() if not p.name.startswith(".")}
    with ShardWriter(tmp_path, "audio", 1, SETTINGS, sorted(values)) as writer:
        assert writer.done == set(values)
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_finished_shard_can_be_extended(tmp_path):
    values = matrices()
    first = sorted(values)[:3]
    for utts in (first, sorted(values)):
        with ShardWriter(tmp_path, "audio", 1, SETTINGS) as writer:
            for utt in utts:
                if utt not in writer.done:
                    writer.write(utt, values[utt])
        merge_shards(tmp_path, "audio", 1, {}, utts)
    for utt, place in read_table(tmp_path / "audio.scp").items():
        np.testing.assert_array_equal(load_matrix(place), values[utt])


def test_redoing_a_shard_removes_the_index_of_the_old_one(tmp_path):
    values = matrices()
    write_shards(tmp_path, values, jobs=1)
    merge_shards(tmp_path, "audio", 1, {}, values)
    with ShardWriter(tmp_path, "audio", 1, {"other": 1}) as writer:
        writer.write("a", np.ones((2, 2)))
        writer.commit()
        assert (tmp_path / "audio.scp").exists()  # the old archive is still whole
    assert not (tmp_path / "audio.scp").exists()


def test_an_error_keeps_what_was_written(tmp_path):
    with pytest.raises(UserError), ShardWriter(tmp_path, "audio", 1, SETTINGS) as writer:
        writer.write("a", np.ones((2, 2)))
        writer.write("b", np.full((2, 2), np.nan))
    with ShardWriter(tmp_path, "audio", 1, SETTINGS) as writer:
        assert writer.done == {"a"}


def test_two_processes_cannot_write_the_same_shard(tmp_path):
    with ShardWriter(tmp_path, "audio", 1, SETTINGS):
        with pytest.raises(UserError, match="another process is writing job 1"):
            ShardWriter(tmp_path, "audio", 1, SETTINGS)
        with ShardWriter(tmp_path, "audio", 2, SETTINGS):
            pass


# ----------------------------------------------------------------------------------------------------------- merging


def test_merge_writes_absences_notes_and_meta(tmp_path):
    with ShardWriter(tmp_path, "text_sim", 1, SETTINGS) as writer:
        writer.write("b", np.ones((2, 3)), hyp="hello there")
        writer.absent("c", "empty\noutput", hyp="")
    with ShardWriter(tmp_path, "text_sim", 2, SETTINGS) as writer:
        writer.write("a", np.ones((4, 3)), hyp="x")
    with ShardWriter(tmp_path, "text_sim", 3, SETTINGS):
        pass  # more jobs than utterances
    merged = merge_shards(tmp_path, "text_sim", 3, {"model": Path("m"), "rate": 25.0}, ["a", "b", "c"])
    assert merged.notes == {"a": {"hyp": "x"}, "b": {"hyp": "hello there"}, "c": {"hyp": ""}}
    assert read_table(tmp_path / "text_sim.absent") == {"c": "empty output"}
    assert read_table(tmp_path / "text_sim.frames") == {"a": "4", "b": "2"}
    assert (tmp_path / "text_sim.yaml").read_text() == (
        f"model: m\nrate: 25.0\ndim: 3\nsettings_hash: {settings_hash(SETTINGS)}\n"
    )
    assert not (tmp_path / "ark" / "text_sim.3.ark").exists()


def test_absent_everywhere_is_an_empty_index(tmp_path):
    with ShardWriter(tmp_path, "video", 1, SETTINGS) as writer:
        writer.absent("a", "no face")
        writer.absent("b", "no face")
    merged = merge_shards(tmp_path, "video", 1, {"dim": 7}, ["a", "b"])
    assert merged.dim is None and not merged.frames
    assert read_table(tmp_path / "video.scp") == read_table(tmp_path / "video.frames") == {}
    feature = load_dump(tmp_path).features["video"]
    assert (feature.dim, feature.entries, feature.absent) == (7, {}, {"a": "no face", "b": "no face"})
    (tmp_path / "video.yaml").unlink()
    assert load_dump(tmp_path).features["video"].dim == 0
    (tmp_path / "video.absent").unlink()
    with pytest.raises(UserError, match=r"video\.scp: empty"):
        load_dump(tmp_path)


def test_shards_of_notes_leave_no_index(tmp_path):
    with ShardWriter(tmp_path, "asr_hyp", 1, SETTINGS) as writer:
        writer.note("a", hyp="words")
        writer.note("b")
    merged = merge_shards(tmp_path, "asr_hyp", 1, {}, ["a", "b"])
    assert merged.notes == {"a": {"hyp": "words"}, "b": {}} and merged.dim is None
    assert os.listdir(tmp_path) == ["ark"]


def test_merge_refuses(tmp_path):
    values = matrices(4)
    write_shards(tmp_path, values, jobs=2)
    with pytest.raises(UserError, match=r"audio.3.json: job 3 of 3 for audio has not finished"):
        merge_shards(tmp_path, "audio", 3, {}, values)
    with pytest.raises(UserError, match="audio of 1 utterances is missing, the first: zz"):
        merge_shards(tmp_path, "audio", 2, {}, [*values, "zz"])
    with pytest.raises(UserError, match="has 1 utterances that are not in the data directory"):
        merge_shards(tmp_path, "audio", 2, {}, sorted(values)[1:])
    assert not (tmp_path / "audio.scp").exists()
    with ShardWriter(tmp_path, "audio", 2, SETTINGS) as writer:
        writer.write(min(values), np.ones((2, 5)))
    with pytest.raises(UserError, match="also written by job 1"):
        merge_shards(tmp_path, "audio", 2, {}, values)
    with ShardWriter(tmp_path, "audio", 2, SETTINGS, ["x"]) as writer:
        writer.write("x", np.ones((2, 6)))
    with pytest.raises(UserError, match="dimension 6, but 5"):
        merge_shards(tmp_path, "audio", 2, {}, values)
    with ShardWriter(tmp_path, "audio", 2, {"other": 1}) as writer:
        writer.write("x", np.ones((2, 5)))
    with pytest.raises(UserError, match="other settings than job 1"):
        merge_shards(tmp_path, "audio", 2, {}, values)
    (tmp_path / "ark" / "audio.2.ark").write_bytes(b"")
    (tmp_path / "ark" / "audio.2.json").write_text(
        json.dumps({**json.loads((tmp_path / "ark" / "audio.1.json").read_text()), "size": 7})
    )
    with pytest.raises(UserError, match="not 7 bytes long"):
        merge_shards(tmp_path, "audio", 2, {}, values)


def test_fewer_jobs_replace_more(tmp_path):
    values = matrices(7)
    for jobs in (4, 2, 3):
        write_shards(tmp_path, values, jobs)
        merge_shards(tmp_path, "audio", jobs, {}, values)
        assert sorted(p.name for p in (tmp_path / "ark").glob("*.ark")) == [f"audio.{j + 1}.ark" for j in range(jobs)]
        for utt, place in read_table(tmp_path / "audio.scp").items():
            np.testing.assert_array_equal(load_matrix(place), values[utt])


# --------------------------------------------------------------------------------------------------------- processes


def _read_many(places: dict[str, str], seed: int) -> int:
    """How many of many random reads gave another utterance's matrix: row 0 of each holds its number."""
    rng = np.random.default_rng(seed)
    utts = sorted(places)
    wrong = 0
    for k in rng.integers(0, len(utts), 800):
        wrong += not (load_matrix(places[utts[k]]) == k).all()
    return wrong


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_reads_are_right_in_parallel_processes(tmp_path, method):
    values = {f"u{k:03d}": np.full((1 + k % 9, 64), k, np.float32) for k in range(100)}
    write_shards(tmp_path, values, jobs=1)
    merge_shards(tmp_path, "audio", 1, {}, values)
    places = read_table(tmp_path / "audio.scp")
    assert _read_many(places, 0) == 0  # the parent has read before the fork
    with multiprocessing.get_context(method).Pool(3) as pool:
        assert pool.starmap(_read_many, [(places, seed) for seed in range(3)]) == [0, 0, 0]


def test_reading_is_about_as_fast_as_kaldiio(tmp_path):
    """In processor time, in which other processes do not count."""
    values = {f"u{k}": np.ones((300, 1024), np.float32) for k in range(40)}
    write_shards(tmp_path, values, jobs=1)
    merge_shards(tmp_path, "audio", 1, {}, values)
    places = list(read_table(tmp_path / "audio.scp").values())

    def best(read) -> float:
        times = []
        for _ in range(5):
            began = time.process_time()
            for place in places:
                read(place)
            times.append(time.process_time() - began)
        return min(times)

    assert best(load_matrix) < 3 * best(kaldiio.load_mat)


# ------------------------------------------------------------------------------------------------------ compression


@pytest.mark.parametrize(("how", "size", "error"), [("two-byte", 0.52, 8e-5), ("one-byte", 0.33, 0.04)])
def test_compressed_archives(tmp_path, how, size, error):
    rng = np.random.default_rng(0)
    values = {f"u{k}": rng.normal(size=(n, 64)).astype(np.float32) for k, n in enumerate((300, 200, 90, 3, 1))}
    write_shards(tmp_path / "full", values)
    write_shards(tmp_path / "small", values, settings={**SETTINGS, "compression": how})
    small = [(tmp_path / kind / "ark/audio.1.ark").stat().st_size for kind in ("small", "full")]
    assert small[0] < size * small[1]
    merged = merge_shards(tmp_path / "small", "audio", 2, {}, values)
    assert merged.frames == {u: len(m) for u, m in values.items()}
    feature = load_dump(tmp_path / "small").features["audio"]
    theirs = kaldiio.load_scp(str(tmp_path / "small/audio.scp"))
    for utt, matrix in values.items():
        read = load_matrix(feature.entries[utt])
        np.testing.assert_array_equal(read, theirs[utt])
        assert read.shape == matrix.shape and np.abs(read - matrix).max() < error * np.abs(matrix).max()


def test_a_killed_compressing_job_goes_on(tmp_path):
    values, settings = matrices(), {"compression": "one-byte"}
    write_shards(tmp_path / "a", values, jobs=1, settings=settings)
    utts = sorted(values)
    writer = ShardWriter(tmp_path / "b", "audio", 1, settings, utts)
    for utt in utts[:3]:
        writer.write(utt, values[utt])
    writer.commit()
    writer.write(utts[3], values[utts[3]])  # lost
    writer.close()
    write_shards(tmp_path / "b", values, jobs=1, settings=settings)
    for name in ("audio.1.ark", "audio.1.json"):
        assert (tmp_path / "a/ark" / name).read_bytes() == (tmp_path / "b/ark" / name).read_bytes()


def test_values_too_far_apart_to_compress(tmp_path):
    with (
        ShardWriter(tmp_path, "audio", 1, {"compression": "two-byte"}) as writer,
        pytest.raises(UserError, match=r"'a': its values lie too far apart"),
    ):
        writer.write("a", np.array([[3e38, -3e38]], np.float32))


def test_the_option_is_part_of_the_settings(tmp_path):
    from sdumc.cli import Parser, add_job_options
    from sdumc.extraction.loop import open_shard

    parser = Parser("x")
    add_job_options(parser, "audio")
    base = ["--data-dir", "d", "--dump-dir", str(tmp_path)]
    for options, settings in (([], {}), (["--compress", "two-byte"], {"compression": "two-byte"})):
        with open_shard(parser.parse_args(base + options), {}, ["a"]) as writer:
            assert writer.settings == settings and not writer.done
            writer.write("a", np.ones((2, 2)))


# ---- versions


def write_part(folder, job, utts, versions, kill_after=None):
    writer = ShardWriter(folder, "audio", job, SETTINGS, utts, versions)
    try:
        for i, utt in enumerate(u for u in utts if u not in writer.done):
            if i == kill_after:
                return sorted(writer.done)
            writer.write(utt, np.ones((2, 3)))
            writer.commit()
        writer.finish()
        return []
    finally:
        writer.close()


def versions_of(folder):
    return yaml.safe_load((folder / "audio.yaml").read_text())["versions"]


def test_versions_are_those_that_made_the_shards(tmp_path):
    write_part(tmp_path, 1, ["a", "b"], {"transformers": "5.23.0", "torch": "2.13"})
    manifest = (tmp_path / "ark/audio.1.json").read_bytes()
    # A finished shard stays whatever is installed now, and so does what its manifest says.
    write_part(tmp_path, 1, ["a", "b"], {"transformers": "6.1.0", "torch": "2.14"})
    assert (tmp_path / "ark/audio.1.json").read_bytes() == manifest
    merge_shards(tmp_path, "audio", 1, {"model": "m"}, ["a", "b"])
    assert versions_of(tmp_path) == {"transformers": "5.23.0", "torch": "2.13"}


def test_shards_of_different_versions(tmp_path, caplog):
    write_part(tmp_path, 1, ["a"], {"transformers": "5.23.0"})
    write_part(tmp_path, 2, ["b"], {"transformers": "5.24.0"})
    merge_shards(tmp_path, "audio", 2, {}, ["a", "b"])
    assert versions_of(tmp_path) == {"transformers": "5.23.0, 5.24.0"}
    assert "shards made by several versions: transformers 5.23.0, 5.24.0" in caplog.text
    write_part(tmp_path, 3, ["c"], {"transformers": "4.57.6"})
    with pytest.raises(UserError, match=r"audio\.3\.json.*transformers 5\.23\.0, 5\.24\.0 and 4\.57\.6.*--force"):
        merge_shards(tmp_path, "audio", 3, {}, ["a", "b", "c"])


def test_killed_job_goes_on_only_with_the_same_major_version(tmp_path):
    utts = ["a", "b", "c", "d"]
    assert write_part(tmp_path, 1, utts, {"transformers": "5.23.0"}, kill_after=1) == ["a"]
    assert write_part(tmp_path, 1, utts, {"transformers": "5.24.0"}, kill_after=1) == ["a", "b"]
    assert write_part(tmp_path, 1, utts, {"transformers": "5.24.1"}) == []
    merge_shards(tmp_path, "audio", 1, {}, utts)
    assert versions_of(tmp_path) == {"transformers": "5.23.0, 5.24.0, 5.24.1"}

    assert write_part(tmp_path, 2, utts, {"transformers": "4.57.0"}, kill_after=2) == ["a", "b"]
    assert write_part(tmp_path, 2, utts, {"transformers": "5.24.0"}, kill_after=1) == ["a"]  # begun anew


def test_manifests_without_versions_are_joined(tmp_path):
    write_part(tmp_path, 1, ["a"], {"transformers": "5.23.0"})
    path = tmp_path / "ark/audio.1.json"
    manifest = json.loads(path.read_text())
    del manifest["versions"]
    path.write_text(json.dumps(manifest))
    merge_shards(tmp_path, "audio", 1, {}, ["a"])
    assert "versions" not in yaml.safe_load((tmp_path / "audio.yaml").read_text())
