"""Batches: the same on any number of ranks, every utterance once, within the budgets, little padding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdumc.data.batches import GlobalBatchSampler


def lengths(count: int = 500) -> list[int]:
    return np.random.default_rng(0).lognormal(5.5, 0.6, count).astype(int).clip(10, 3000).tolist()


def epoch(sampler: GlobalBatchSampler, number: int = 0) -> list[list[int]]:
    sampler.set_epoch(number)
    return [sampler.global_batch(i) for i in range(len(sampler))]


@settings(max_examples=80, deadline=None)
@given(
    frames=st.lists(st.integers(0, 500), max_size=60),
    batch_size=st.integers(1, 20),
    batch_frames=st.one_of(st.none(), st.integers(1, 3000)),
    seed=st.integers(0, 5),
    shuffle=st.booleans(),
    world=st.integers(1, 5),
)
def test_every_utterance_once_within_both_limits(frames, batch_size, batch_frames, seed, shuffle, world):
    ranks = [GlobalBatchSampler(frames, batch_size, batch_frames, seed, shuffle, world, r) for r in range(world)]
    alone = GlobalBatchSampler(frames, batch_size, batch_frames, seed, shuffle)
    for number in (0, 1, 7):
        batches = epoch(alone, number)
        assert sorted(i for b in batches for i in b) == list(range(len(frames)))
        for batch in batches:
            assert 1 <= len(batch) <= batch_size
            if batch_frames is not None and len(batch) > 1:
                assert len(batch) * max(frames[i] for i in batch) <= batch_frames
        shares = []
        for sampler in ranks:
            sampler.set_epoch(number)
            share = list(sampler)
            assert len(share) == len(sampler) == len(alone)
            shares.append(share)
        for i, batch in enumerate(batches):
            assert sorted(k for share in shares for k in share[i]) == sorted(batch)
            assert [share[i] for share in shares] == [batch[r::world] for r in range(world)]
            assert all(sampler.global_batch(i) == batch for sampler in ranks)


@settings(max_examples=60, deadline=None)
@given(
    frames=st.lists(st.integers(0, 500), min_size=1, max_size=60),
    batch_size=st.integers(1, 12),
    batch_frames=st.one_of(st.none(), st.integers(1, 3000)),
    seed=st.integers(0, 2**31),
    world=st.integers(1, 4),
    epochs=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    data=st.data(),
)
def test_a_killed_run_goes_on_with_the_same_batches(frames, batch_size, batch_frames, seed, world, epochs, data):
    """An epoch's batches depend on its number only: not on the epochs before it, nor on where the run was taken up."""
    make = lambda rank: GlobalBatchSampler(frames, batch_size, batch_frames, seed, world_size=world, rank=rank)  # noqa: E731
    for rank in range(world):
        used = make(rank)
        for number in epochs:
            used.set_epoch(number)
            whole = list(used)
            fresh = make(rank)
            fresh.set_epoch(number)
            fresh.start_batch = data.draw(st.integers(0, len(whole)))
            first = fresh.start_batch
            assert list(fresh) == whole[first:]
            assert list(fresh) == whole


@settings(max_examples=40, deadline=None)
@given(frames=st.lists(st.integers(1, 500), min_size=40, max_size=200), seed=st.integers(0, 1000))
def test_every_epoch_and_seed_has_an_order_of_its_own(frames, seed):
    one, other = GlobalBatchSampler(frames, 4, seed=seed), GlobalBatchSampler(frames, 4, seed=seed + 1)
    orders = [[i for batch in epoch(one, number) for i in batch] for number in range(4)]
    orders.append([i for batch in epoch(other) for i in batch])
    assert len(set(map(tuple, orders))) == len(orders)


def test_without_frame_limit_the_batches_are_full():
    sizes = sorted(len(b) for b in epoch(GlobalBatchSampler(lengths(), 32)))
    assert len(sizes) == 16 and sizes[2:] == [32] * 14
    assert sizes[:2] == [26, 26]  # 500 = 14 x 32 + 52: the rest is shared evenly, no batch is tiny


def test_a_small_rest_is_not_a_batch_of_one():
    assert sorted(len(b) for b in epoch(GlobalBatchSampler([7] * 97, 96))) == [48, 49]


def test_little_padding():
    frames = lengths()
    for shuffle, limit in ((False, 1.15), (True, 1.25)):
        batches = epoch(GlobalBatchSampler(frames, 32, 16000, shuffle=shuffle))
        padded = sum(len(b) * max(frames[i] for i in b) for b in batches)
        assert padded / sum(frames) < limit
    unsorted = np.random.default_rng(0).permutation(len(frames))
    random = sum(32 * max(frames[i] for i in unsorted[k : k + 32]) for k in range(0, len(frames), 32))
    assert random / sum(frames) > 2  # what that saves


def test_epochs_differ_and_repeat():
    make = lambda seed: GlobalBatchSampler(lengths(), 16, 8000, seed)  # noqa: E731
    assert epoch(make(1), 3) == epoch(make(1), 3)
    assert epoch(make(1), 3) != epoch(make(1), 4) and epoch(make(1), 3) != epoch(make(2), 3)
    groups = [{frozenset(b) for b in epoch(make(1), e)} for e in range(5)]
    assert len(set.union(*groups)) > 0.95 * sum(map(len, groups))  # also the company changes, not only the order
    assert len({len(epoch(make(1), e)) for e in range(20)}) == 1
    longest = int(np.argmax(lengths()))
    positions = [next(i for i, b in enumerate(epoch(make(1), e)) if longest in b) for e in range(8)]
    assert len(set(positions)) > 3


def test_without_shuffling_every_epoch_is_the_same():
    frames = lengths()
    sampler = GlobalBatchSampler(frames, 16, shuffle=False)
    assert epoch(sampler, 0) == epoch(sampler, 1)
    order = [frames[i] for b in epoch(sampler) for i in b]
    assert order == sorted(order, reverse=True)


def test_going_on_in_the_middle_of_an_epoch():
    sampler = GlobalBatchSampler(lengths(), 16, world_size=2, rank=1)
    sampler.set_epoch(2)
    whole = list(sampler)
    again = GlobalBatchSampler(lengths(), 16, world_size=2, rank=1)
    again.start_batch = 5
    again.set_epoch(2)
    assert list(again) == whole[5:] and len(again) == len(whole)
    assert list(again) == whole  # once only
    again.start_batch = len(whole)
    assert list(again) == []


def test_an_utterance_beyond_the_budget_is_alone():
    batches = epoch(GlobalBatchSampler([100] * 10 + [5000], 8, 1000))
    assert [10] in batches and sum(map(len, batches)) == 11


def test_fewer_utterances_than_ranks():
    shares = [list(GlobalBatchSampler([5, 5], 8, world_size=4, rank=r)) for r in range(4)]
    assert [len(s) for s in shares] == [1, 1, 1, 1]
    assert [len(s[0]) for s in shares] == [1, 1, 0, 0]


def test_ranks_get_similar_loads():
    frames = lengths()
    shares = [list(GlobalBatchSampler(frames, 32, 16000, world_size=2, rank=r)) for r in range(2)]
    loads = [sum(frames[i] for b in share for i in b) for share in shares]
    assert max(loads) / min(loads) < 1.1


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"batch_frames": 0}, {"rank": 1}, {"rank": -1}])
def test_wrong_arguments(bad):
    with pytest.raises(ValueError):
        GlobalBatchSampler([1, 2], **{"batch_size": 2, **bad})


def test_an_epoch_goes_over_a_small_set_several_times():
    make = lambda count, **more: GlobalBatchSampler(lengths(count), 32, seed=5, **more)  # noqa: E731
    assert [make(n, min_batches=40).passes for n in (80, 300, 1281, 16000)] == [14, 4, 1, 1]
    small, once = make(80, min_batches=40), make(80)
    for number in (1, 2):
        batches = epoch(small, number)
        assert len(batches) == 42 >= 40
        passes = [batches[i : i + 3] for i in range(0, 42, 3)]
        assert all(sorted(i for b in one for i in b) == list(range(80)) for one in passes)
        assert passes[0] == epoch(once, number)
        assert all(a != b for a, b in itertools.pairwise(passes))  # each in an order of its own
    assert epoch(small, 1) != epoch(small, 2)
    # On two ranks the same batches, from the middle of an epoch too.
    ranks = [make(80, min_batches=40, world_size=2, rank=r) for r in range(2)]
    for rank in ranks:
        rank.set_epoch(2)
        rank.start_batch = 17
    shares = list(zip(*ranks, strict=True))
    assert [sorted(a + b) for a, b in shares] == [sorted(b) for b in epoch(small, 2)[17:]]
    assert len(GlobalBatchSampler([], 32, min_batches=40)) == 0


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    batch_size=st.integers(1, 12),
    batch_frames=st.one_of(st.none(), st.integers(1, 3000)),
    seed=st.integers(0, 5),
    min_batches=st.integers(1, 9),
    data=st.data(),
)
def test_shares_of_several_corpora(sizes, batch_size, batch_frames, seed, min_batches, data):
    """Each pass draws the stated number of each part, none twice, within the limits; and in turn everybody comes."""
    frames = data.draw(st.lists(st.integers(0, 500), min_size=sum(sizes), max_size=sum(sizes)))
    shares = [data.draw(st.sampled_from([1.0, 0.5, 0.3, 0.01])) for _ in sizes]
    sampler = GlobalBatchSampler(
        frames, batch_size, batch_frames, seed, min_batches=min_batches, parts=list(zip(sizes, shares, strict=True))
    )
    counts = [max(1, round(size * share)) for size, share in zip(sizes, shares, strict=True)]
    assert sampler.draws == sum(counts) * sampler.passes and len(sampler) >= min_batches
    seen: list[set[int]] = [set() for _ in sizes]
    for number in range(1, 4):
        batches = epoch(sampler, number)
        for batch in batches:
            assert 1 <= len(batch) <= batch_size
            if batch_frames is not None and len(batch) > 1:
                assert len(batch) * max(frames[i] for i in batch) <= batch_frames
        a_pass = len(batches) // sampler.passes
        for k in range(sampler.passes):
            drawn = [i for batch in batches[k * a_pass : (k + 1) * a_pass] for i in batch]
            assert len(drawn) == len(set(drawn))
            start = 0
            for part, (size, count) in enumerate(zip(sizes, counts, strict=True)):
                mine = {i for i in drawn if start <= i < start + size}
                assert len(mine) == count
                if len(seen[part]) + count <= size // count * count:  # within one order nobody comes twice
                    seen[part] |= mine
                start += size


def test_a_share_comes_round():
    """Two passes of a half see every utterance once, and four see each twice."""
    sampler = GlobalBatchSampler([5] * 30, 4, parts=[(10, 1.0), (20, 0.5)])
    drawn = [[i for batch in epoch(sampler, number) for i in batch] for number in range(4)]
    assert all(sorted(i for i in d if i < 10) == list(range(10)) for d in drawn)
    halves = [sorted(i for i in d if i >= 10) for d in drawn]
    assert sorted(halves[0] + halves[1]) == sorted(halves[2] + halves[3]) == list(range(10, 30))
    assert halves[0] != halves[2]


def test_the_order_of_several_corpora_is_frozen():
    """Of a run that is continued after an update, the batches must still be these."""
    sampler = GlobalBatchSampler([9, 3, 7, 5, 8, 2, 6, 4], 3, None, 7, parts=[(3, 1.0), (5, 0.4)])
    assert [epoch(sampler, number) for number in (1, 2)] == [[[0, 4, 2], [6, 1]], [[7, 1], [0, 2, 6]]]
    # All of every part is what one corpus gives.
    whole = GlobalBatchSampler([9, 3, 7, 5, 8, 2, 6, 4], 3, None, 7, parts=[(3, 1.0), (5, 1.0)])
    assert epoch(whole, 1) == epoch(GlobalBatchSampler([9, 3, 7, 5, 8, 2, 6, 4], 3, None, 7), 1)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="add up"):
        GlobalBatchSampler([1, 2, 3], 2, parts=[(2, 1.0)])
    with pytest.raises(ValueError, match="add up"):
        GlobalBatchSampler([1, 2, 3], 2, parts=[(3, 2.0)])
