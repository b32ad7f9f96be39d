"""Utterances and padded batches."""

from __future__ import annotations

import math
from pathlib import Path

import kaldiio
import numpy as np
import pytest
import torch

from sdumc.data.batches import Utterance, UtteranceDataset, collate
from sdumc.data.dump import load_dump
from sdumc.data.shards import ShardWriter, merge_shards
from sdumc.data.tables import write_table
from sdumc.errors import UserError

UTTS = [f"u{k}" for k in range(8)]


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, dim in (("audio", 3), ("text", 5)):
        with ShardWriter(tmp_path, name, 1, {}) as writer:
            for k, utt in enumerate(UTTS):
                if name == "text" and k < 2:
                    writer.absent(utt, "none")
                else:
                    writer.write(utt, rng.normal(size=(k + 1, dim)))
        merge_shards(tmp_path, name, 1, {}, UTTS)
    write_table(tmp_path / "utt2label", {u: k / 4 for k, u in enumerate(UTTS)})
    return tmp_path


def test_utterances(dump):
    dataset = UtteranceDataset(load_dump(dump), ["audio", "text"])
    assert len(dataset) == 8 and dataset.dims == {"audio": 3, "text": 5}
    assert dataset.frames == [1, 2, 6, 8, 10, 12, 14, 16]
    first = dataset[0]
    assert (first.id, first.label, first.features["text"]) == ("u0", 0.0, None)
    assert first.features["audio"].shape == (1, 3) and first.features["audio"].dtype == torch.float32
    first.features["audio"] += 1  # writable, without harm to the next read
    assert not torch.equal(first.features["audio"], dataset[0].features["audio"])


def test_batches_are_padded_with_zeros(dump):
    dataset = UtteranceDataset(load_dump(dump), ["audio", "text"])
    batch = collate([dataset[k] for k in (4, 0, 2)])
    assert batch.ids == ["u4", "u0", "u2"] and len(batch) == 3
    torch.testing.assert_close(batch.labels, torch.tensor([1.0, 0.0, 0.5]))
    assert batch.features["audio"].shape == (3, 5, 3) and batch.features["text"].shape == (3, 5, 5)
    assert batch.lengths["audio"].tolist() == [5, 1, 3] and batch.lengths["text"].tolist() == [5, 0, 3]
    assert batch.lengths["audio"].dtype == torch.int64
    for name in ("audio", "text"):
        for row, (k, length) in enumerate(zip((4, 0, 2), batch.lengths[name], strict=True)):
            if length:
                assert torch.equal(batch.features[name][row, :length], dataset[k].features[name])
            assert (batch.features[name][row, length:] == 0).all()


def test_absent_everywhere_still_has_one_frame_of_zeros(dump):
    dataset = UtteranceDataset(load_dump(dump), ["audio", "text"])
    batch = collate([dataset[0], dataset[1]])
    assert batch.features["text"].shape == (2, 1, 5) and batch.lengths["text"].tolist() == [0, 0]
    assert (batch.features["text"] == 0).all()


def test_empty_and_single_batches():
    empty = collate([])
    assert len(empty) == 0 and empty.features == {} and empty.labels.shape == (0,)
    one = collate([Utterance("a", 1.0, {"audio": torch.ones(2, 3)})])
    assert one.features["audio"].shape == (1, 2, 3) and one.to("cpu").ids == ["a"]


def test_labels_are_nan_when_there_are_none(dump):
    (dump / "utt2label").unlink()
    assert math.isnan(UtteranceDataset(load_dump(dump), ["audio"])[0].label)


def test_missing_feature(dump):
    with pytest.raises(UserError, match=r"video.scp: missing"):
        UtteranceDataset(load_dump(dump), ["audio", "video"])


def break_feature(dump: Path, values: np.ndarray) -> None:
    """Put another matrix for u3 into an archive made elsewhere, as no writer of ours would."""
    kaldiio.save_ark(str(dump / "bad.ark"), {"u3": values}, scp=str(dump / "bad.scp"))
    table = dict(line.split() for line in (dump / "audio.scp").read_text().splitlines())
    table.update(line.split() for line in (dump / "bad.scp").read_text().splitlines())
    write_table(dump / "audio.scp", table)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 3), np.nan), "NaN or infinite"),
        (np.full((4, 3), -np.inf), "NaN or infinite"),
        (np.ones((4, 2)), "dimension 2, but"),
        (np.ones((9, 3)), "9 frames, but .*audio.frames"),
    ],
)
def test_bad_features_name_utterance_and_file(dump, values, message):
    break_feature(dump, values.astype(np.float32))
    try:
        dataset = UtteranceDataset(load_dump(dump), ["audio"])
    except UserError as e:  # the last matrix of an archive is looked at early
        assert "dimension 2" in str(e)
        return
    with pytest.raises(UserError, match=message) as error:
        dataset[3]
    assert "utterance 'u3'" in str(error.value) and "bad.ark" in str(error.value)
