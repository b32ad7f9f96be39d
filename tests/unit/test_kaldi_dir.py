"""Data directories: what is read, what is refused and how it is said, what fixing keeps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sdumc.data.kaldi_dir import (
    FIX_STAGE,
    Segment,
    check_tables,
    finish_kaldi_dir,
    first_problems,
    fix_kaldi_dir,
    load_kaldi_dir,
    read_tables,
    shard,
    validate_kaldi_dir,
)
from sdumc.data.tables import MediaSpan, append_dropped, read_dropped, read_table, write_table
from sdumc.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
UTTS = ["-s0_1", "s1_1", "s1_2", "s2$_$1"]


def wav(path: Path, seconds: float = 0.5, rate: int = 16000) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(int(seconds * rate), 0.1, np.float32), rate)
    return str(path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A valid directory of four utterances, ids beginning with `-` and holding `$` and `_` among them."""
    path = tmp_path / "data" / "train"
    write_table(path / "wav.scp", {u: wav(tmp_path / "media dir" / f"{i}.wav") for i, u in enumerate(UTTS)})
    write_table(path / "utt2spk", {u: u.split("_")[0] for u in UTTS})
    write_table(path / "text", dict.fromkeys(UTTS, "some words"))
    write_table(path / "utt2label", dict(zip(UTTS, [-3, 0, 0.3333333, 3], strict=True)))
    return path


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_load(data, tmp_path):
    result = load_kaldi_dir(data)
    assert result.utterances == sorted(UTTS)
    assert result.utt2label["-s0_1"] == -3.0
    assert result.audio_source("s1_1") == MediaSpan(str(tmp_path / "media dir" / "1.wav"))
    assert result.video_source("s1_1") is None
    assert validate_kaldi_dir(data, check_media=True) == []


def test_optional_files_may_be_absent(data):
    for name in ("text", "utt2label"):
        (data / name).unlink()
    result = load_kaldi_dir(data)
    assert result.text == {} and result.utt2label == {}


def test_table_round_trip_is_sorted_bytewise(tmp_path):
    ids = ["b", "a_1", "a-1", "a1", "A", "é", "z", "\U0001f600", "\uffee"]
    write_table(tmp_path / "t", {u: f"x {u}  y" for u in ids})
    lines = (tmp_path / "t").read_bytes().splitlines()
    assert lines == sorted(lines)
    assert read_table(tmp_path / "t") == {u: f"x {u}  y" for u in ids}


def test_empty_values_only_where_allowed(tmp_path):
    write_table(tmp_path / "t", {"a": "", "b": "word"})
    assert (tmp_path / "t").read_text() == "a\nb word\n"
    assert read_table(tmp_path / "t", allow_empty=True) == {"a": "", "b": "word"}
    with pytest.raises(UserError, match=r"t:1: utterance 'a': nothing after the id"):
        read_table(tmp_path / "t")


@pytest.mark.parametrize("bad", ["", "a b", "a\tb", "a\n"])
def test_write_table_refuses_ids_that_cannot_be_read_back(tmp_path, bad):
    with pytest.raises(UserError, match="white space"):
        write_table(tmp_path / "t", {bad: "x"})
    with pytest.raises(UserError, match="line break"):
        write_table(tmp_path / "t", {"a": "x\ny"})
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a 1\na 2\n", r"t:2: utterance 'a': given twice \(first in line 1\)"),
        (b"b 1\na 2\n", r"t:2: utterance 'a': out of order after 'b'.*LC_ALL=C sort"),
        (b"a 1\nA 2\n", r"t:2: utterance 'A': out of order"),
        (b"a 1\nb 2\na 3\n", r"t:3: utterance 'a': given twice"),
        (b"a 1\nb \n", r"t:2: utterance 'b': nothing after the id"),
        (b"a \xff\n", r"t:1: utterance 'a': not UTF-8"),
        (b"a 1\r\nb 2\r\n", r"t:1: Windows line end"),
        (b"a 1\n\nb 2\n", r"t:2: empty line"),
        (b" a 1\n", r"t:1: starts with white space"),
        (b"\xef\xbb\xbfa 1\n", r"t:1: starts with a byte order mark"),
        (None, r"t: cannot be read"),
    ],
)
def test_bad_tables(tmp_path, content, message):
    if content is not None:
        (tmp_path / "t").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / "t")


def test_last_line_without_line_end_and_tabs_are_read(tmp_path):
    (tmp_path / "t").write_text("a\t 1\nb   2  3")
    assert read_table(tmp_path / "t") == {"a": "1", "b": "2  3"}


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("utt2label", "0.3333333", "nan", r"utt2label:3: utterance 's1_2': label 'nan' is not a finite number"),
        ("utt2label", "0.3333333", "inf", r"utt2label:3: utterance 's1_2': label 'inf' is not a finite number"),
        ("utt2label", "0.3333333", "high", r"utt2label:3: utterance 's1_2': label 'high' is not a finite number"),
        ("utt2label", "0.3333333", "1_0", r"utt2label:3: utterance 's1_2': label '1_0' is not a finite number"),
        ("utt2label", "0.3333333", "3.01", r"utt2label:3: utterance 's1_2': label 3.01 is outside \[-3, 3\]"),
        ("utt2label", "s1_2 0.3333333", "s1_2", r"utt2label:3: utterance 's1_2': nothing after the id"),
        ("utt2label", "s1_2 0.3333333\n", "", r"utt2label: utterance 's1_2': missing here, but is in wav.scp"),
        ("wav.scp", "s1_2", "s1_3", r"wav.scp: utterance 's1_2': missing here, but is in utt2spk"),
        ("text", "s1_2 some words", "s1_2  ", r"text:3: utterance 's1_2': nothing after the id"),
        ("text", "s1_2 some words", "s1_2 \u00a0", r"text:3: utterance 's1_2': nothing after the id"),
        ("utt2spk", "s1_2 s1", "s1_2 x", r"utt2spk:3: utterance 's1_2': speaker 'x' is not a prefix"),
        ("wav.scp", "1.wav", "1.wav |", r"wav.scp:2: utterance 's1_1': a command \(pipe\)"),
    ],
)
def test_bad_directories(data, file, old, new, message):
    edit(data / file, old, new)
    with pytest.raises(UserError, match=message):
        load_kaldi_dir(data)
    assert any(re.search(message, str(p)) for p in validate_kaldi_dir(data, check_media=False))


def test_every_problem_is_listed(data):
    (data / "utt2label").write_text("-s0_1 9\ns1_1 x\ns1_2 nan\nzz 1\n")
    problems = [str(p) for p in validate_kaldi_dir(data, check_media=False)]
    assert len([p for p in problems if "utt2label:" in p and "label" in p.split("utterance")[1]]) == 3
    assert any("'zz': missing" in p for p in problems) and any("'s2$_$1': missing" in p for p in problems)


def test_a_problem_is_a_value(segmented):
    (segmented / "text").write_text("a_2 words\na_1\n")
    (segmented / "wav.scp").write_text((segmented / "wav.scp").read_text().replace("rec2 ", "rec2 |"))
    problems = validate_kaldi_dir(segmented, check_media=False)
    found = {(p.file.name, p.line, p.utterance, p.recording, p.lossless) for p in problems}
    assert found == {
        ("text", 2, "a_1", None, False),  # nothing after the id
        ("text", 2, "a_1", None, True),  # out of order
        ("text", None, "b_1", None, False),  # missing
        ("wav.scp", 2, None, "rec2", False),  # a pipe
    }
    assert first_problems(problems, load_segments(segmented)).keys() == {"a_1", "b_1"}


def load_segments(path: Path) -> dict[str, Segment]:
    return check_tables(path, read_tables(path, ["segments"])[0])[0].segments


def test_missing_directory_and_files(tmp_path, data):
    with pytest.raises(UserError, match="no such data directory"):
        validate_kaldi_dir(tmp_path / "none", check_media=False)
    (data / "utt2spk").unlink()
    with pytest.raises(UserError, match="utt2spk: missing"):
        load_kaldi_dir(data)


def test_bad_media_names_the_utterance(data, tmp_path):
    media = tmp_path / "media dir"
    (media / "0.wav").unlink()
    (media / "1.wav").write_bytes(b"")
    raw = (media / "2.wav").read_bytes()
    (media / "2.wav").write_bytes(raw[: len(raw) // 2])
    wav(media / "3.wav", seconds=0)
    problems = [str(p) for p in validate_kaldi_dir(data, check_media=True)]
    assert len(problems) == 4
    for utt, words in zip(UTTS, ["no such media file", "0 bytes", "cut short", "no samples"], strict=True):
        assert any(repr(utt) in p and words in p and "wav.scp" in p for p in problems), (utt, problems)


@pytest.fixture
def segmented(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "seg"
    write_table(path / "wav.scp", {"rec1": wav(tmp_path / "r1.wav", 3), "rec2": wav(tmp_path / "r2.wav", 1)})
    write_table(path / "segments", {"a_1": "rec1 0 1.5", "a_2": "rec1 1.5 3.0", "b_1": "rec2 0.25 1"})
    write_table(path / "utt2spk", {"a_1": "a", "a_2": "a", "b_1": "b"})
    return path


def test_segments(segmented, tmp_path):
    result = load_kaldi_dir(segmented)
    assert result.utterances == ["a_1", "a_2", "b_1"]
    assert result.audio_source("a_2") == MediaSpan(str(tmp_path / "r1.wav"), 1.5, 3.0)
    finish_kaldi_dir(segmented)
    assert read_table(segmented / "utt2dur") == {"a_1": "1.500", "a_2": "1.500", "b_1": "0.750"}
    assert validate_kaldi_dir(segmented, check_media=True) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0.25 1", "1 0.25", "start 1 and end 0.25 must satisfy"),
        ("0.25 1", "-1 1", "must satisfy 0 <= start"),
        ("0.25 1", "nan 1", "must be seconds"),
        ("rec2 0.25 1", "rec2 0.25", "expected `utterance recording start end`"),
        ("rec2 0.25 1", "rec3 0.25 1", "recording 'rec3': missing"),
        ("0.25 1", "0.25 9", "ends at 9 s, but .* has 1 s"),
    ],
)
def test_bad_segments(segmented, old, new, message):
    edit(segmented / "segments", old, new)
    assert any(re.search(message, str(p)) for p in validate_kaldi_dir(segmented, check_media=True))


def test_finish_writes_derived_files(data):
    finish_kaldi_dir(data)
    assert (data / "spk2utt").read_text() == "-s0 -s0_1\ns1 s1_1 s1_2\ns2$ s2$_$1\n"
    assert read_table(data / "utt2dur")["s1_1"] == "0.500"
    assert validate_kaldi_dir(data, check_media=True) == []
    edit(data / "spk2utt", "s1_1 ", "")
    assert any("differs from utt2spk" in str(p) for p in validate_kaldi_dir(data, check_media=False))


def test_fix_sorts_and_merges_repeated_lines(data):
    before = read_table(data / "text")
    lines = (data / "text").read_text().splitlines()
    (data / "text").write_text("\n".join([*lines[::-1], lines[0]]) + "\n")
    assert fix_kaldi_dir(data, data / "dropped.tsv", 0.0) == []
    assert read_table(data / "text") == before
    assert not (data / "dropped.tsv").exists()


def test_fix_lists_what_it_leaves_out(data, tmp_path):
    finish_kaldi_dir(data)
    edit(data / "text", "s1_1 some words", "s1_1")
    edit(data / "utt2label", "s1_2 0.3333333", "s1_2 nan")
    rows = fix_kaldi_dir(data, data / "dropped.tsv", 0.5)
    assert [r[0] for r in rows] == ["s1_1", "s1_2"]
    assert rows == read_dropped(data / "dropped.tsv")
    assert rows[0][2] == "text: nothing after the id; give a value or remove the line"
    assert rows[1][2] == "utt2label: label 'nan' is not a finite number; correct it or leave the utterance out"
    assert load_kaldi_dir(data).utterances == ["-s0_1", "s2$_$1"]
    assert validate_kaldi_dir(data, check_media=True) == []
    # A second run leaves out nothing more, and the list stays; a further loss counts on top of the earlier one.
    assert fix_kaldi_dir(data, data / "dropped.tsv", 0.5) == []
    assert len(read_dropped(data / "dropped.tsv")) == 2
    edit(data / "utt2label", "-s0_1 -3", "-s0_1 -4")
    with pytest.raises(UserError, match="3 of 4 utterances"):
        fix_kaldi_dir(data, data / "dropped.tsv", 0.5)


@pytest.mark.parametrize("line", ["s1_1 0", "s1_1 7", ""])
def test_fix_keeps_durations_only_while_they_are_sure(data, line):
    finish_kaldi_dir(data)
    edit(data / "utt2dur", "s1_1 0.500", line or "s1_1 0.500\ns1_1 0.500")
    if line.endswith("7"):
        edit(data / "utt2dur", line, f"s1_1 0.500\n{line}")
    assert fix_kaldi_dir(data, data / "dropped.tsv", 0.0) == []
    assert (data / "utt2dur").exists() == (line == "")
    assert validate_kaldi_dir(data, check_media=False) == []


def test_fix_over_the_limit_changes_nothing(data):
    edit(data / "text", "s1_1 some words\n", "")
    before = {p.name: p.read_bytes() for p in data.iterdir()}
    with pytest.raises(UserError, match=r"1 of 4 utterances \(25.0%\).*more than the 1% allowed"):
        fix_kaldi_dir(data, data / "dropped.tsv", 0.01)
    assert {p.name: p.read_bytes() for p in data.iterdir() if p.name != "dropped.tsv"} == before
    reason = "text: missing here, but is in wav.scp, utt2spk, utt2label"
    assert read_dropped(data / "dropped.tsv") == [("s1_1", FIX_STAGE, reason)]
    # Once the file is mended, the list is too.
    (data / "text").write_bytes(before["text"].replace(b"s1_2", b"s1_1 some words\ns1_2"))
    fix_kaldi_dir(data, data / "dropped.tsv", 0.01)
    assert read_dropped(data / "dropped.tsv") == []


def test_fix_with_segments_and_broken_media(segmented, tmp_path):
    (tmp_path / "r2.wav").write_bytes(b"")
    rows = fix_kaldi_dir(segmented, segmented / "dropped.tsv", 0.5, check_media=True)
    assert [r[0] for r in rows] == ["b_1"] and "0 bytes" in rows[0][2]
    assert read_table(segmented / "wav.scp").keys() == {"rec1"}
    assert validate_kaldi_dir(segmented, check_media=True) == []


def test_fix_drops_doubled_ids_with_different_values_and_bad_encoding(data):
    with open(data / "text", "ab") as f:
        f.write(b"s1_1 other words\n")
    raw = (data / "text").read_bytes().replace(b"s1_2 some", b"s1_2 s\xffme")
    (data / "text").write_bytes(raw)
    rows = {r[0]: r[2] for r in fix_kaldi_dir(data, data / "dropped.tsv", 0.5)}
    assert rows == {
        "s1_1": "text: given twice (first in line 2); remove one",
        "s1_2": "text: not UTF-8 text; convert the file with iconv",
    }


def test_nothing_left_is_an_error_even_with_everything_allowed(data):
    (data / "utt2label").write_text("".join(f"{u} x\n" for u in sorted(UTTS)))
    with pytest.raises(UserError, match="4 of 4"):
        fix_kaldi_dir(data, data / "dropped.tsv", 1.0)


def test_append_dropped_keeps_one_line_for_each_stage(tmp_path):
    append_dropped(tmp_path / "d.tsv", [("b", "data", "no\tlabel"), ("a", "data", "x")])
    append_dropped(tmp_path / "d.tsv", [("b", "data", "other"), ("b", "text", "y")])
    assert (tmp_path / "d.tsv").read_text() == "a\tdata\tx\nb\tdata\tother\nb\ttext\ty\n"


def test_shard():
    utts = [f"u{i}" for i in range(7)]
    parts = [shard(utts[::-1], f"{j}/3") for j in (1, 2, 3)]
    assert parts[0] == ["u0", "u3", "u6"] and sorted(parts[0] + parts[1] + parts[2]) == utts
    assert [shard(["a"], f"{j}/3") for j in (1, 2, 3)] == [["a"], [], []]
    for bad in ("0/3", "4/3", "1", "a/b", "1/2/3", "-1/2"):
        with pytest.raises(UserError, match="shard"):
            shard(utts, bad)


def script(name: str, *args: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "utils" / name, *map(str, args)], capture_output=True, text=True, check=False
    )


def test_scripts(data, tmp_path):
    result = script("validate_data_dir.py", data)
    assert result.returncode == 0 and "4 utterances of 3 speakers" in result.stdout
    edit(data / "utt2label", "0.3333333", "33")
    (tmp_path / "media dir" / "0.wav").write_bytes(b"")
    result = script("validate_data_dir.py", data)
    assert result.returncode == 1 and "utt2label:3" in result.stderr and "0 bytes" in result.stderr
    result = script("fix_data_dir.py", data)
    assert result.returncode == 1 and "50.0%" in result.stderr and "Traceback" not in result.stderr
    result = script("fix_data_dir.py", data, "--max-drop", 0.5)
    assert result.returncode == 0 and "kept 2 utterances, left out 2" in result.stdout
    assert script("validate_data_dir.py", data).returncode == 0
