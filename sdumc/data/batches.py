"""Which utterances make a batch, and batches that threads read ahead.

:class:`GlobalBatchSampler` puts utterances of similar length together, the same on any number of ranks.
:class:`BatchLoader` reads: each value is copied once, from the page cache into the padded batch. Threads are enough,
because reading is system calls and array code, which release Python's lock. Worker processes would add copies between
processes and limits of shared memory. The memory of a batch is reused for later ones: allocating 300 MB can take ten
times as long as filling them. :func:`collate` makes the same batches from single utterances.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import os
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from sdumc.data.dump import Dump, all_finite, load_matrix, read_float_matrix, split_rxspecifier
from sdumc.errors import UserError

# Lengths are multiplied by a random factor within 1 +- _JITTER before they are sorted: utterances have other neighbours
# in each epoch, and those of a batch still differ by no more than about a fifth in length.
_JITTER = 0.1


class GlobalBatchSampler:
    """Gives each rank its share of each global batch, as utterance indices.

    Global batches depend only on the lengths, the sizes, the seed and the epoch. An epoch goes over the set once, or
    several times if the set is small (``passes``); each utterance is in exactly one batch of a pass. All epochs have
    the same number of batches. Rank r of W takes every W-th utterance of a batch, starting with the r-th, so every rank
    makes the same number of steps. When a batch has fewer utterances than there are ranks, **the last ranks get an
    empty list** and take part in that step without data.

    Args:
        frames: frames of each utterance (summed over its features).
        batch_size: the most utterances in a global batch.
        batch_frames: the most frames in a global batch, padding included (utterances x longest utterance); None for
            no limit. An utterance that is longer than this is a batch of its own.
        seed: decides, with the epoch, the order.
        shuffle: in each epoch, mix utterances of similar length and shuffle the batches; otherwise utterances are in
            order of falling length.
        world_size: number of ranks.
        rank: this rank.
        min_batches: an epoch has as many passes as it takes to have so many batches.
        parts: sizes of consecutive parts of the set, and the share of each, above 0 and at most 1, that a pass draws;
            empty: all of it. Other passes draw others, so that all come in turn.

    Attributes:
        passes: how often an epoch goes over the set.
        draws: utterances of an epoch, in all passes.
        start_batch: the first batch of the next iteration, to continue in the middle of an epoch. Set it before
            iterating; it applies to one iteration and is then 0 again.

    Raises:
        ValueError: a size is below 1 or the rank is not below the world size.
    """

    def __init__(
        self,
        frames: Sequence[int],
        batch_size: int,
        batch_frames: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        world_size: int = 1,
        rank: int = 0,
        min_batches: int = 1,
        parts: Sequence[tuple[int, float]] = (),
    ):
        if batch_size < 1 or (batch_frames is not None and batch_frames < 1):
            raise ValueError(f"batch_size {batch_size} and batch_frames {batch_frames} must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} must be at least 0 and below the world size {world_size}")
        self.frames = np.asarray(frames, dtype=np.int64)
        self.seed, self.shuffle, self.world_size, self.rank = seed, shuffle, world_size, rank
        self.epoch = 0
        self.start_batch = 0
        self._parts = [(size, max(1, round(size * share))) for size, share in parts or [(len(frames), 1.0)] if size]
        if sum(size for size, _ in self._parts) != len(frames) or any(size < count for size, count in self._parts):
            raise ValueError(f"parts {parts} must add up to the {len(frames)} utterances, with shares of 1 at most")
        self._cuts = _cut(self._longest_at_each_place(), batch_size, batch_frames)
        self.passes = max(1, -(-min_batches // max(1, len(self._cuts) - 1)))
        self.draws = self._cuts[-1] * self.passes
        self._batches: list[list[int]] | None = None

    def _longest_at_each_place(self) -> np.ndarray:
        """An upper bound of the length at each place of an epoch's order, for any jitter.

        The i-th largest jittered length is at most (1 + j) times the i-th largest length, and the true length of that
        utterance at most 1 / (1 - j) times its jittered one. Batches that are cut by these bounds are within the frame
        budget in every epoch, and their number is the same in all. Of a part of which a pass draws a share, the longest
        are taken.
        """
        longest, start = [np.zeros(0, dtype=np.int64)], 0
        for size, count in self._parts:
            longest.append(np.sort(self.frames[start : start + size])[::-1][:count])
            start += size
        falling = np.sort(np.concatenate(longest))[::-1].astype(np.float64)
        if not self.shuffle or not len(falling):
            return falling
        return np.minimum(falling * (1 + _JITTER) / (1 - _JITTER), falling[0])

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the batches that come next."""
        if epoch != self.epoch:
            self.epoch = epoch
            self._batches = None

    def _global_batches(self) -> list[list[int]]:
        if self._batches is None:
            self._batches = [batch for k in range(self.passes) for batch in self._pass(k)]
        return self._batches

    def _drawn(self, number: int) -> np.ndarray:
        """The indices that one pass of this epoch draws, in rising order.

        Of a part's share, consecutive passes take consecutive pieces of a random order, so that every utterance comes
        before one comes again (but for what is left at the end of an order). Nothing but the number of the pass and the
        seed decides.
        """
        turn, start, found = self.epoch * self.passes + number, 0, [np.zeros(0, dtype=np.int64)]
        for i, (size, count) in enumerate(self._parts):
            pieces = size // count
            rng = np.random.default_rng([self.seed, len(self._parts), i, turn // pieces])
            piece = turn % pieces * count
            chosen = np.arange(size) if count == size else np.sort(rng.permutation(size)[piece : piece + count])
            found.append(start + chosen)
            start += size
        return np.concatenate(found)

    def _pass(self, number: int) -> list[list[int]]:
        """The batches of one pass of this epoch over the set."""
        drawn = self._drawn(number)
        keys = self.frames[drawn].astype(np.float64)
        rng = np.random.default_rng([self.seed, self.epoch, number] if number else [self.seed, self.epoch])
        ties = np.arange(len(keys))
        if self.shuffle:
            keys = keys * rng.uniform(1 - _JITTER, 1 + _JITTER, len(keys))
            ties = rng.permutation(len(keys))
        order = drawn[np.lexsort((ties, -keys))]
        batches = [order[a:b].tolist() for a, b in zip(self._cuts, self._cuts[1:], strict=False)]
        return [batches[i] for i in rng.permutation(len(batches))] if self.shuffle else batches

    def global_batch(self, i: int) -> list[int]:
        """Utterance indices of the i-th global batch of this epoch, over all ranks."""
        return list(self._global_batches()[i])

    def __len__(self) -> int:
        """Number of global batches in a whole epoch."""
        return (len(self._cuts) - 1) * self.passes

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start_batch = self.start_batch, 0
        return iter([batch[self.rank :: self.world_size] for batch in self._global_batches()[start:]])


def _cut(falling: np.ndarray, batch_size: int, batch_frames: int | None) -> list[int]:
    """Where to cut an order of falling lengths into batches: places from 0 to the number of utterances."""
    cuts = [0]
    count = len(falling)
    while cuts[-1] < count:
        first = cuts[-1]
        size = batch_size
        if batch_frames is not None and falling[first] > 0:
            size = max(1, min(size, int(batch_frames / falling[first])))
        cuts.append(min(first + size, count))
    # The last batch may be small: share the last two evenly. Both limits still hold, because lengths fall, and neither
    # Rank-N-Contrast nor a rank gets a batch of very few utterances.
    if len(cuts) > 2:
        cuts[-2] = cuts[-3] + (count - cuts[-3] + 1) // 2 if cuts[-1] - cuts[-2] < cuts[-2] - cuts[-3] else cuts[-2]
    return cuts


@dataclass
class Utterance:
    """One utterance: features (T, D) by name, None where the modality is absent; ``dims`` gives D also for those.

    ``label`` is NaN for a set without labels.
    """

    id: str
    label: float
    features: dict[str, torch.Tensor | None]
    dims: dict[str, int] = field(default_factory=dict)


@dataclass
class Batch:
    """Utterances padded to a common length.

    Attributes:
        ids: B utterance ids.
        labels: (B,) float32, NaN without labels.
        features: by name (B, T, D) float32, T at least 1; zero beyond ``lengths``.
        lengths: by name (B,) int64 frames; 0 where the modality is absent.
    """

    ids: list[str]
    labels: torch.Tensor
    features: dict[str, torch.Tensor]
    lengths: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on ``device``; with ``non_blocking`` the copy may still run when this returns."""
        return Batch(
            ids=self.ids,
            labels=self.labels.to(device, non_blocking=non_blocking),
            features={name: x.to(device, non_blocking=non_blocking) for name, x in self.features.items()},
            lengths={name: x.to(device, non_blocking=non_blocking) for name, x in self.lengths.items()},
        )


class UtteranceDataset:
    """The utterances of a dump folder, in the order of ``dump.utterances``; matrices are read when asked for.

    Args:
        dump: a loaded dump folder.
        names: the features to read.

    Raises:
        UserError: the dump has no such feature. When reading: an archive is cut short, or a matrix has NaN or infinite
            values, another dimension than the feature, or another length than its ``.frames`` file states.
    """

    def __init__(self, dump: Dump, names: Sequence[str]):
        for name in names:
            if name not in dump.features:
                raise UserError(f"{dump.path / f'{name}.scp'}: missing, but needed; run the stage that makes it")
        self.dump = dump
        self.names = tuple(names)
        self.dims = {name: dump.features[name].dim for name in self.names}

    def __len__(self) -> int:
        return len(self.dump.utterances)

    @property
    def frames(self) -> list[int]:
        """Frames of each utterance, summed over the features read: what a sampler needs."""
        tables = [self.dump.features[name].frames for name in self.names]
        return [sum(table.get(utt, 0) for table in tables) for utt in self.dump.utterances]

    def __getitem__(self, index: int) -> Utterance:
        utt = self.dump.utterances[index]
        return Utterance(
            id=utt,
            label=self.dump.labels.get(utt, math.nan),
            features={name: self.read(name, utt) for name in self.names},
            dims=self.dims,
        )

    def read(self, name: str, utt: str) -> torch.Tensor | None:
        """One feature (T, D) of an utterance, checked; None where it is absent."""
        feature = self.dump.features[name]
        if utt not in feature.entries:
            return None
        folder, own_name = self.dump.place(utt)
        where = f"{folder / f'{name}.scp'}: utterance {own_name!r}"
        try:
            matrix = load_matrix(feature.entries[utt])
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
        where += f" in {feature.entries[utt]}"
        if matrix.shape[1] != feature.dim:
            raise UserError(
                f"{where}: dimension {matrix.shape[1]}, but the feature has {feature.dim}; make the feature again"
            )
        if matrix.shape[0] != feature.frames[utt]:
            raise UserError(
                f"{where}: {matrix.shape[0]} frames, but {folder / f'{name}.frames'} states "
                f"{feature.frames[utt]}; make the feature again"
            )
        if not all_finite(matrix):
            raise UserError(
                f"{where}: NaN or infinite values; make the feature again, or list the utterance in {name}.absent"
            )
        return torch.from_numpy(matrix)


def collate(utterances: list[Utterance]) -> Batch:
    """Pad utterances to a :class:`Batch`.

    An empty list (a rank that has no share of a small global batch) gives a batch of length 0 without features.
    """
    if not utterances:
        return Batch(ids=[], labels=torch.zeros(0), features={}, lengths={})
    features, lengths = {}, {}
    for name in utterances[0].features:
        values = [u.features[name] for u in utterances]
        lengths[name] = torch.tensor([0 if v is None else len(v) for v in values], dtype=torch.int64)
        dim = next((v.shape[1] for v in values if v is not None), None)
        if dim is None:
            dim = utterances[0].dims[name]
        padded = torch.zeros(len(values), max(1, int(lengths[name].max())), dim)
        for row, value in zip(padded, values, strict=True):
            if value is not None:
                row[: len(value)] = value
        features[name] = padded
    return Batch(
        ids=[u.id for u in utterances],
        labels=torch.tensor([u.label for u in utterances], dtype=torch.float32),
        features=features,
        lengths=lengths,
    )


_PAGE = mmap.PAGESIZE // 4  # values in a page; copying is fastest when a feature begins at one
_HEADROOM = 1.125  # blocks are so much larger than asked for, to fit later batches; untouched pages use no memory
_WASTE = 4  # a block is not used for a batch that is so many times smaller


class _Task(NamedTuple):
    """A matrix to read into ``rows`` (T, D) of a batch, and the ``padding`` (P, D) behind it to fill with zeros."""

    archive: str
    offset: int
    name: str
    position: int  # of the utterance in the dataset
    rows: np.ndarray
    padding: np.ndarray


class BatchLoader:
    """Iterates over the padded batches of a sampler, in its order; bit for bit what ``collate`` makes of them.

    The tensors of a batch share one block of memory. A later batch reuses the block when none of these tensors and no
    view of them exists any more. Values are checked to be finite when a matrix is read for the first time.

    Args:
        dataset: what to read.
        sampler: gives a list of indices for each batch.
        num_workers: threads that read; with 0, a batch is read when it is asked for.
        prefetch: batches being read while one is in use.
        pin_memory: put batches into memory from which a GPU copies without waiting.

    Raises:
        UserError: while iterating, as :class:`UtteranceDataset`.
    """

    def __init__(
        self,
        dataset: UtteranceDataset,
        sampler: GlobalBatchSampler | Sequence[Sequence[int]],
        num_workers: int = 2,
        prefetch: int = 2,
        pin_memory: bool = False,
    ):
        if num_workers < 0 or prefetch < 1:
            raise ValueError(f"num_workers {num_workers} must be at least 0 and prefetch {prefetch} at least 1")
        self.dataset, self.sampler = dataset, sampler
        self.num_workers, self.prefetch, self.pin_memory = num_workers, prefetch, pin_memory
        self._blocks = _Blocks(keep=2)
        self._converted: set[str] = set()  # archives of compressed matrices or doubles
        self._checked = {name: bytearray(len(dataset)) for name in dataset.names}

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        if self.num_workers == 0:
            for indices in self.sampler:
                yield self._read_now(indices)
            return
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix="reader")
        pending: deque[tuple[Batch, list[Future]]] = deque()
        try:
            for indices in self.sampler:
                pending.append(self._submit(pool, indices))
                if len(pending) > self.prefetch:
                    yield _finished(pending)
            while pending:
                yield _finished(pending)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _read_now(self, indices: Sequence[int]) -> Batch:
        batch, tasks = self._prepare(indices)
        self._read(tasks)
        return batch

    def _submit(self, pool: ThreadPoolExecutor, indices: Sequence[int]) -> tuple[Batch, list[Future]]:
        batch, tasks = self._prepare(indices)
        return batch, [pool.submit(self._read, share) for share in _shares(tasks, self.num_workers)]

    def _prepare(self, indices: Sequence[int]) -> tuple[Batch, list[_Task]]:
        """A batch whose memory has no values yet, and the matrices to read into it, in the order of the archives."""
        dump = self.dataset.dump
        utts = [dump.utterances[i] for i in indices]
        batch = Batch(
            ids=utts,
            labels=torch.tensor([dump.labels.get(utt, math.nan) for utt in utts], dtype=torch.float32),
            features={},
            lengths={},
        )
        tasks: list[_Task] = []
        if not utts:
            return batch, tasks
        shapes, end = {}, 0
        for name in self.dataset.names:
            feature = dump.features[name]
            frames = [feature.frames[utt] if utt in feature.entries else 0 for utt in utts]
            batch.lengths[name] = torch.tensor(frames, dtype=torch.int64)
            shapes[name] = (end, (len(utts), max(1, *frames), feature.dim))
            end += -(-math.prod(shapes[name][1]) // _PAGE) * _PAGE
        memory = self._memory(end)
        for name, (start, shape) in shapes.items():
            values = memory[start : start + math.prod(shape)].view(shape)
            batch.features[name] = values
            entries = dump.features[name].entries
            for i, utt, rows, frames in zip(indices, utts, values.numpy(), batch.lengths[name].tolist(), strict=True):
                archive, offset = split_rxspecifier(entries[utt]) if frames else ("", 0)
                tasks.append(_Task(archive, offset, name, i, rows[:frames], rows[frames:]))
        tasks.sort(key=lambda task: task[:2])
        return batch, tasks

    def _memory(self, count: int) -> torch.Tensor:
        """Float32 (count,), undefined values."""
        if self.pin_memory:  # torch caches pinned memory itself, and reuses it only when the GPU has read it
            return torch.empty(count, dtype=torch.float32, pin_memory=True)
        return self._blocks.take(count)

    def _read(self, tasks: Sequence[_Task]) -> None:
        """Fill a share of a batch. Archives are opened and closed here, so no other thread can move a file position."""
        opened, fd = "", -1
        try:
            for task in tasks:
                if len(task.padding):
                    task.padding[:] = 0
                if not len(task.rows):
                    continue
                if task.archive != opened:
                    if fd >= 0:
                        os.close(fd)
                        fd = -1
                    opened, fd = task.archive, _open(task.archive)
                checked = self._checked[task.name]
                if not (
                    fd >= 0
                    and task.archive not in self._converted
                    and read_float_matrix(fd, task.offset, task.rows)
                    and (checked[task.position] or all_finite(task.rows))
                ):
                    # Not plain float32, or damaged: `dataset.read` converts it or raises the precise error.
                    utt = self.dataset.dump.utterances[task.position]
                    matrix = self.dataset.read(task.name, utt)
                    assert matrix is not None  # an absent one has no rows
                    task.rows[:] = matrix.numpy()
                    self._converted.add(task.archive)
                checked[task.position] = True
        finally:
            if fd >= 0:
                os.close(fd)


def _open(archive: str) -> int:
    try:
        return os.open(archive, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _finished(pending: deque[tuple[Batch, list[Future]]]) -> Batch:
    batch, futures = pending.popleft()
    for future in futures:
        future.result()
    return batch


def _shares(tasks: Sequence[_Task], count: int) -> list[list[_Task]]:
    """Consecutive parts of about the same number of bytes."""
    sizes = np.cumsum([task.rows.nbytes + task.padding.nbytes for task in tasks])
    if not len(sizes):
        return []
    cuts = [0, *np.searchsorted(sizes, sizes[-1] * np.arange(1, count) / count).tolist(), len(tasks)]
    return [list(tasks[a:b]) for a, b in itertools.pairwise(cuts) if a < b]


class _Blocks:
    """Blocks of memory that are reused once no tensor refers to them.

    When a new one is made and ``keep`` unused ones do not fit, one of these is dropped. Blocks are private to the
    process: a forked process gets copies.
    """

    def __init__(self, keep: int):
        self.keep = keep
        self._free: deque[mmap.mmap] = deque()  # thread-safe: a tensor can be freed in any thread

    def take(self, count: int) -> torch.Tensor:
        """Float32 (count,), undefined values, beginning at a page."""
        free: list[mmap.mmap] = []
        with contextlib.suppress(IndexError):
            while True:
                free.append(self._free.popleft())
        free.sort(key=len)
        size = 4 * max(count, 1)
        block = next((b for b in free if size <= len(b) <= _WASTE * size), None)
        if block is not None:
            free.remove(block)
        else:
            block = mmap.mmap(-1, int(_HEADROOM * size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if len(free) >= self.keep:  # drop the smallest if it is too small, else the largest
                free.pop(0 if len(free[0]) < size else -1)
        self._free.extend(free)
        lease = np.frombuffer(block, dtype=np.float32, count=max(count, 1))
        # The tensor's storage refers to the lease, and every view refers to the storage.
        weakref.finalize(lease, self._free.append, block).atexit = False
        return torch.frombuffer(lease, dtype=torch.float32, count=max(count, 1))[:count]
