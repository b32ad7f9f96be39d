"""CMU-MOSI: its own raw layout read to the same data as MOSEI's, and its recipe, which is MOSEI's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from helpers import mosei_miniature as mini
from helpers.recipes import call_recipe, copy_recipes

from sdumc.bin import prepare_mosei
from sdumc.corpora import raw
from sdumc.corpora.annotations import read_labels, read_transcripts
from sdumc.errors import UserError


def make_mosi(folder: Path) -> Path:
    """MOSEI's miniature in MOSI's folders: transcripts without times, one table of labels with them."""
    mini.make_raw(folder)
    top = folder / "Raw"
    (top / "Video").mkdir()
    (top / "Videos/Full/Combined").rename(top / "Video/Full")
    (top / "Audio/WAV_16000").mkdir()
    (top / "Audio/Full/WAV_16000").rename(top / "Audio/WAV_16000/Full")
    for name in ("Videos", "Labels", "Transcript"):
        shutil.rmtree(top / name)
    transcripts = top / "Transcript/Segmented"
    transcripts.mkdir(parents=True)
    rows = []
    for line in mini.LINES:
        with open(transcripts / f"{line.video}.annotprocessed", "a") as f:
            f.write(f"{line.clip}_DELIM_{line.text}\n")
        if line.answers:
            label = mini.labels()[line.video, line.clip]
            rows.append(f"{line.start},{line.end},{line.video},{line.clip},{label}\n")
    (top / "Labels").mkdir()
    (top / "Labels/OpinionLevelSentiment.csv").write_text("".join(reversed(rows)))
    return folder


def tables(data: Path) -> dict[str, str]:
    """All tables, with paths of media reduced to the files' names."""
    found = {}
    for path in sorted(data.glob("*/*")):
        if path.is_file() and path.name != "dropped.tsv":
            lines = [line.split() for line in path.read_text().splitlines()]
            found[f"{path.parent.name}/{path.name}"] = "\n".join(
                " ".join(os.path.basename(w) for w in words) for words in lines
            )
    return found


def test_the_same_data_from_either_layout(tmp_path, capsys):
    options = ["--max-drop", "0.3", "--folds"]
    mosei, mosi = mini.make_raw(tmp_path / "mosei"), make_mosi(tmp_path / "mosi")
    prepare_mosei.main(["--corpus-dir", str(mosei), "--data-dir", str(tmp_path / "a"), *options, str(mosei / "folds")])
    capsys.readouterr()
    words = ["--corpus-dir", str(mosi), "--data-dir", str(tmp_path / "b"), "--counts", "mosi"]
    prepare_mosei.main([*words, *options, str(mosi / "folds")])
    output = capsys.readouterr().out
    assert "2 (52)  7 (1284)" in output and "OpinionLevelSentiment.csv" in output
    assert tables(tmp_path / "a") == tables(tmp_path / "b")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0,1,v,1,4", "label from -3 to 3"),
        ("0,1,v,1", "start,end,video,clip,label"),
        ("0,x,v,1,2", "start,end,video,clip,label"),
        ("0,1,v,0,2", "given twice, differently"),
    ],
)
def test_bad_rows_are_refused(tmp_path, row, message):
    file = tmp_path / "labels.csv"
    file.write_text(f"0,1,v,0,1.5\n{row}\n")
    with pytest.raises(UserError, match=message) as error:
        read_labels(file)
    assert f"{file}:2" in str(error.value)


def test_transcripts_without_times(tmp_path):
    folder = tmp_path / "Transcript/Segmented"
    folder.mkdir(parents=True)
    (folder / "v.annotprocessed").write_text("1_DELIM_WELL A_DELIM_B\nno separator\n2_DELIM_SO\n2_DELIM_NO\n")
    found = read_transcripts(tmp_path)
    assert found.clips["v"]["1"].text == "WELL A_DELIM_B" and list(found.clips["v"]) == ["1"]
    assert set(found.refused["v"]) == {"line2", "2"}
    media = raw.MediaFiles(False, {"v": Path("v.mp4")}, {})
    reason = raw.locate(found.clips["v"]["1"], "v", "1", media)
    assert isinstance(reason, str) and "starts and ends" in reason


@pytest.fixture
def recipe(tmp_path) -> Path:
    return copy_recipes(tmp_path, "mosei", "mosi")


def test_raw_first_stages(recipe, tmp_path):
    corpus = make_mosi(tmp_path / "corpus")
    words = ["--corpus-dir", corpus, "--folds", corpus / "folds", "--max-drop", 0.3]
    output = call_recipe(
        recipe, *words, "--ngpu", 0, "--encoder=", "--llm=", "--asr-model=", "--vision-model=", "--stop-stage", 1
    )
    assert "2 (52)  7 (1284)" in output and f"no media file (such as {mini.LOST}-0;" in output
    assert (recipe / "data/test/segments").exists()
    assert not (recipe.parent / "mosei/data").exists()


@pytest.mark.slow
def test_toolkit(recipe, tmp_path):
    """The pickle that most people hold, with MOSI's counts beside those found, up to the report."""
    pickle = mini.make_pickle(tmp_path / "unaligned_50.pkl")
    (recipe / "small.yaml").write_text("base: conf/train.yaml\nepochs: 2\ndim: 16\ncontent-dim: 8\nbatch-size: 4\n")
    words = ["--source", "toolkit", "--pickle", pickle, "--nproc", 1, "--train-config", "small.yaml"]
    output = call_recipe(recipe, *words, "--ngpu", 0)
    assert "3 (52)  8 (1284)" in output and "2 (31)  4 (686)" in output
    assert "SHA-256" in output and "not that of CMU-MOSI's unaligned_50.pkl as published" in output
    assert "not finite, set to 0" in output
    assert (recipe / "exp/toolkit/small_seed1/decode_test/none/score.json").exists()
    assert "missing: no text (none was simulated)" in (recipe / "RESULTS.toolkit.md").read_text()
