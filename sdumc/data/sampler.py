"""Batches of utterances of similar length, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

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
