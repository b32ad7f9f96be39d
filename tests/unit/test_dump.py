"""Dump folders: our own and ones made elsewhere, and everything that can be wrong with them."""

from __future__ import annotations

import shutil
from pathlib import Path

import kaldiio
import numpy as np
import pytest

from sdumc.data.dump import load_dump, load_matrix
from sdumc.data.shards import ShardWriter, merge_shards
from sdumc.data.tables import read_table, write_table
from sdumc.errors import UserError

UTTS = ["-a_1", "a_2", "b_1"]


def matrix(k: int, dim: int) -> np.ndarray:
    return np.full((k + 2, dim), k, np.float32)


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    """As the stages make it, with text absent for one utterance."""
    path = tmp_path / "recipe" / "dump" / "train"
    for name, dim in (("audio", 4), ("text", 6)):
        with ShardWriter(path, name, 1, {}) as writer:
            for k, utt in enumerate(UTTS):
                if (name, utt) == ("text", "a_2"):
                    writer.absent(utt, "no transcript")
                else:
                    writer.write(utt, matrix(k, dim))
        merge_shards(path, name, 1, {"model": "m"}, UTTS)
    write_table(path / "utt2label", dict(zip(UTTS, [0.5, -3, 3], strict=True)))
    write_table(path / "utt2spk", {u: u.rsplit("_", 1)[0] for u in UTTS})
    return path


def foreign(path: Path) -> Path:
    """Made elsewhere, by kaldiio: an index, an archive and labels, nothing else."""
    path.mkdir(parents=True)
    values = {u: matrix(k, 7) for k, u in enumerate(UTTS)}
    kaldiio.save_ark(str(path / "audio.ark"), values, scp=str(path / "audio.scp"))
    write_table(path / "utt2label", dict.fromkeys(UTTS, 1))
    return path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_our_own(dump):
    result = load_dump(dump)
    assert result.utterances == UTTS and result.labels == {"-a_1": 0.5, "a_2": -3.0, "b_1": 3.0}
    assert result.utt2spk["b_1"] == "b"
    audio, text = result.features["audio"], result.features["text"]
    assert set(result.features) == {"audio", "text"}
    assert (audio.dim, text.dim) == (4, 6) and audio.meta["model"] == "m"
    assert audio.frames == {"-a_1": 2, "a_2": 3, "b_1": 4}
    assert text.absent == {"a_2": "no transcript"} and "a_2" not in text.entries
    np.testing.assert_array_equal(load_matrix(text.entries["b_1"]), matrix(2, 6))


def test_made_elsewhere(tmp_path):
    result = load_dump(foreign(tmp_path / "x"))
    feature = result.features["audio"]
    assert feature.dim == 7 and feature.frames == {"-a_1": 2, "a_2": 3, "b_1": 4}
    assert feature.meta == {} and feature.absent == {}


@pytest.mark.parametrize("prefix", ["", "dump/x/", "x/", "recipe/dump/x/"])
def test_relative_archives(tmp_path, monkeypatch, prefix):
    path = foreign(tmp_path / "recipe" / "dump" / "x")
    (path / "audio.scp").write_text((path / "audio.scp").read_text().replace(str(path) + "/", prefix))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for cwd in (tmp_path, tmp_path / "recipe", path, elsewhere):
        monkeypatch.chdir(cwd)
        entries = load_dump(path).features["audio"].entries
        np.testing.assert_array_equal(load_matrix(entries["b_1"]), matrix(2, 7))


def test_a_folder_that_was_moved(dump, tmp_path):
    shutil.move(dump, tmp_path / "moved")
    entries = load_dump(tmp_path / "moved").features["audio"].entries
    np.testing.assert_array_equal(load_matrix(entries["b_1"]), matrix(2, 4))


def test_without_labels(dump):
    (dump / "utt2label").unlink()
    result = load_dump(dump)
    assert result.utterances == UTTS and result.labels == {}
    with pytest.raises(UserError, match="utt2label: missing, but needed"):
        load_dump(dump, require=["utt2label"])


def test_chosen_and_required_features(dump):
    assert set(load_dump(dump, names=["audio", "video"]).features) == {"audio"}
    with pytest.raises(UserError, match=r"video.scp: missing, but needed"):
        load_dump(dump, require=["video"])
    with pytest.raises(UserError, match=r"holds none of video\.scp"):
        load_dump(dump, names=["video"])
    with pytest.raises(UserError, match="no such dump folder"):
        load_dump(dump / "none")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("utt2label", "a_2 -3", "a_2 -3.5", r"utt2label:2: utterance 'a_2': label -3.5 is outside"),
        ("utt2label", "a_2 -3", "a_2 nan", r"utt2label:2: utterance 'a_2': label 'nan' is not a finite number"),
        ("utt2label", "a_2 -3", "a_2", r"utt2label:2: utterance 'a_2': nothing after the id"),
        ("utt2label", "a_2 -3", "b_1 -3", r"utt2label:3: utterance 'b_1': given twice"),
        ("utt2label", "a_2 -3\n", "", r"audio.scp: 1 utterances are not in .*utt2label, the first: 'a_2'"),
        ("utt2label", "a_2 -3", "a_2 -3\na_3 1", r"audio.scp: 1 utterances of .* missing, the first: 'a_3'.*\.absent"),
        ("audio.scp", "\na_2", "\nc_2", r"audio.scp:3: utterance 'b_1': out of order after 'c_2'"),
        ("audio.scp", "audio.1.ark:", "gone.ark:", r"audio.scp: utterance '-a_1': archive .*gone.ark not found"),
        ("audio.frames", "a_2 3", "a_2 3.5", r"audio.frames:2: utterance 'a_2': '3.5' is not a number of frames"),
        ("audio.frames", "a_2 3\n", "", r"audio.frames: 1 utterances of .*audio.scp are missing, the first: 'a_2'"),
        ("text.absent", "a_2 no", "b_1 no", r"text.absent: utterance 'b_1': is in .*text.scp too"),
        ("audio.yaml", "dim: 4", "dim: 5", r"audio.yaml: states dimension 5, but the matrices have 4"),
        ("utt2spk", "a_2 a\n", "", r"utt2spk: 1 utterances of .* are missing"),
    ],
)
def test_bad_folders(dump, file, old, new, message):
    edit(dump / file, old, new)
    with pytest.raises(UserError, match=message):
        load_dump(dump)


@pytest.mark.parametrize("with_frames", [True, False])
def test_a_cut_archive_is_noticed_before_training(dump, with_frames):
    if not with_frames:
        (dump / "audio.frames").unlink()
    ark = dump / "ark" / "audio.1.ark"
    ark.write_bytes(ark.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"audio.scp: utterance 'b_1': .*audio.1.ark:\d+: the archive is cut short"):
        load_dump(dump)


def test_dimensions_that_differ(tmp_path):
    path = foreign(tmp_path / "x")
    kaldiio.save_ark(str(path / "odd.ark"), {"b_1": matrix(2, 8)}, scp=str(path / "odd.scp"))
    table = {**read_table(path / "audio.scp"), **read_table(path / "odd.scp")}
    write_table(path / "audio.scp", table)
    with pytest.raises(UserError, match="utterance 'b_1': dimension 8, but 7"):
        load_dump(path)


def test_empty_index_and_empty_matrix(tmp_path):
    path = foreign(tmp_path / "x")
    kaldiio.save_ark(str(path / "z.ark"), {u: np.zeros((0, 7), np.float32) for u in UTTS}, scp=str(path / "audio.scp"))
    with pytest.raises(UserError, match="empty matrix"):
        load_dump(path)
    (path / "audio.scp").write_text("")
    with pytest.raises(UserError, match=r"audio\.scp: empty"):
        load_dump(path)
