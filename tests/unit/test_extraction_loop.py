"""The loop over a shard that all features share."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from sdumc.data.shards import ShardWriter, merge_shards
from sdumc.errors import UserError
from sdumc.extraction.loop import Output, extract_shard, read_ahead

BATCHES = [["a", "b"], ["c"], ["d", "e"]]
UTTS = ["a", "b", "c", "d", "e"]


def run(folder, read, compute, batches=BATCHES, **more):
    with ShardWriter(folder, "audio", 1, {}, UTTS) as writer:
        extract_shard(batches, writer, read, compute, **more)
    return merge_shards(folder, "audio", 1, {}, UTTS)


def lengths(items):
    return [Output(np.full((n, 2), n, np.float32)) for _, n in items]


def test_every_kind_of_output_is_written(tmp_path):
    def read(utt):
        return Output(absent="no face", notes={"face": "0.0"}) if utt == "c" else len(utt)

    def compute(items):
        return [Output(notes={"hyp": utt}) if utt == "e" else Output(np.ones((3, 2))) for utt, _ in items]

    merged = run(tmp_path, read, compute)
    assert merged.frames == {"a": 3, "b": 3, "d": 3}
    assert merged.absent == {"c": "no face"}
    assert merged.notes == {"c": {"face": "0.0"}, "e": {"hyp": "e"}}


def test_a_batch_without_anything_to_compute(tmp_path):
    merged = run(tmp_path, lambda utt: Output(absent="no video"), lambda items: pytest.fail("nothing to compute"))
    assert set(merged.absent) == set(UTTS)


def test_next_batch_is_read_while_one_is_computed(tmp_path):
    """Each batch is computed only when the next one has been read: this ends only if both happen at once."""
    was_read = {u: threading.Event() for u in UTTS}

    def read(utt):
        was_read[utt].set()
        return 1

    def compute(items):
        following = {"a": "c", "c": "d"}.get(items[0][0])
        assert following is None or was_read[following].wait(600)
        return lengths(items)

    assert set(run(tmp_path, read, compute).frames) == set(UTTS)


def test_reading_ahead_keeps_the_order_and_raises_where_the_batch_comes():
    def read(batch):
        if batch == [3]:
            raise UserError("no sound")
        return sum(batch)

    found = []
    with pytest.raises(UserError, match="no sound"):
        for batch, value in read_ahead([[1], [2, 2], [3], [4]], read):
            found.append((batch, value))
    assert found == [([1], 1), ([2, 2], 4)]


def unreadable_c(utt):
    if utt == "c":
        raise UserError("c.wav: cut short")
    return 1


def test_unreadable_media_stop_the_job_after_what_came_before(tmp_path):
    with pytest.raises(UserError, match=r"c\.wav: cut short \(or go on without it: --bad-media absent\)"):
        run(tmp_path, unreadable_c, lengths)
    with ShardWriter(tmp_path, "audio", 1, {}, UTTS) as writer:  # goes on after the last commit
        assert writer.done == {"a", "b"}
        extract_shard(BATCHES, writer, lambda utt: 2, lengths)
    assert merge_shards(tmp_path, "audio", 1, {}, UTTS).frames == {"a": 1, "b": 1, "c": 2, "d": 2, "e": 2}


def test_unreadable_media_count_as_absent(tmp_path, caplog):
    merged = run(tmp_path, unreadable_c, lengths, bad_media="absent")
    assert merged.absent == {"c": "c.wav: cut short"}
    assert merged.notes == {"c": {"bad_media": "c.wav: cut short"}}
    assert "c: taken as absent: c.wav: cut short" in caplog.text


def test_something_else_stands_for_unreadable_media(tmp_path):
    merged = run(tmp_path, unreadable_c, lengths, bad_media="absent", instead=lambda reason: 7)
    assert merged.frames["c"] == 7 and not merged.absent


def test_errors_of_the_model_are_no_bad_media(tmp_path):
    def compute(items):
        raise UserError("model: no such layer")

    with pytest.raises(UserError, match=r"^model: no such layer$"):
        run(tmp_path, lambda utt: 1, compute, bad_media="absent")


def test_lack_of_memory_halves_only_what_is_computed(tmp_path):
    sizes = []

    def compute(items):
        sizes.append(len(items))
        if len(items) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return lengths(items)

    merged = run(tmp_path, lambda utt: Output(absent="x") if utt == "c" else 1, compute, batches=[UTTS])
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    assert len(merged.frames) == 4 and set(merged.absent) == {"c"}
