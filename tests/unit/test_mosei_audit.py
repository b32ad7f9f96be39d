"""Transcripts against recognised speech."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sdumc.bin import audit_transcripts
from sdumc.corpora.audit import compare, leave_out, overlap, triples
from sdumc.data.dump import load_dump
from sdumc.data.kaldi_dir import load_kaldi_dir
from sdumc.data.shards import ShardWriter, merge_shards
from sdumc.data.tables import write_table
from sdumc.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {
    "good-0": "I really liked this film, it was great.",
    "good-1": "Yeah.",
    "moved-0": "the actors are wonderful in every scene",
    "moved-1": "but the music nearly ruined the evening",
    "moved-2": "so three stars out of five from me",
    "other-0": "welcome back to my channel everyone",
    "other-1": "today we look at a kitchen machine",
}
HEARD = {
    "good-0": "i really like this film it was great",
    "good-1": "no",
    "moved-0": "but the music nearly ruined the evening",
    "moved-1": "so three stars out of five from me",
    "moved-2": "thank you very much for watching",
    "other-0": "",
    "other-1": "",
}
SPEAKERS = {u: u.split("-")[0] for u in TEXTS}


def data_dir(folder: Path) -> Path:
    folder.mkdir(parents=True)
    write_table(folder / "text", TEXTS)
    write_table(folder / "text_asr", HEARD)
    write_table(folder / "utt2spk", SPEAKERS)
    write_table(folder / "utt2label", dict.fromkeys(TEXTS, "1"))
    write_table(
        folder / "spk2utt", {s: " ".join(sorted(u for u in TEXTS if SPEAKERS[u] == s)) for s in SPEAKERS.values()}
    )
    write_table(folder / "wav.scp", {s: f"{s}.wav" for s in SPEAKERS.values()})
    times = {u: f"{SPEAKERS[u]} {u[-1]} {int(u[-1]) + 1}" for u in TEXTS}
    write_table(folder / "segments", times)
    return folder


def test_overlap():
    assert overlap(triples("abcd"), triples("ab cd")) == 1
    assert overlap(triples("abcd"), triples("xyzw")) == 0
    assert overlap(triples("abcde"), triples("abcxe")) == pytest.approx(1 / 3)
    assert overlap(triples(""), triples("")) == 1 and overlap(triples("a"), triples("")) == 0


def test_findings_are_ranked_and_name_the_clip_that_fits():
    findings = compare(TEXTS, HEARD, SPEAKERS)
    by_utt = {f.utt: f for f in findings}
    assert {f.utt for f in findings[:5]} == {"other-0", "other-1", "moved-0", "moved-1", "moved-2"}
    assert [f.suspicious for f in findings] == [True] * 5 + [False] * 2
    assert [f.overlap for f in findings[:5]] == sorted(f.overlap for f in findings[:5])
    assert by_utt["moved-0"].fits == "moved-1" and by_utt["moved-1"].fits == "moved-2" and not by_utt["moved-2"].fits
    assert not by_utt["good-0"].suspicious and by_utt["good-0"].wer == pytest.approx(1 / 8)
    assert not by_utt["good-1"].suspicious and by_utt["good-1"].wer == 1  # too short to say
    assert by_utt["other-0"].heard == 0


def test_texts_of_other_utterances_are_refused():
    with pytest.raises(UserError, match="in one of the two texts only"):
        compare(TEXTS, {**HEARD, "more": "x"}, SPEAKERS)


def test_command(tmp_path, capsys):
    data = data_dir(tmp_path / "data/train")
    with ShardWriter(tmp_path / "dump/train", "audio", 1, {}) as writer:
        for utt in TEXTS:
            writer.write(utt, np.ones((2, 3)))
    merge_shards(tmp_path / "dump/train", "audio", 1, {}, list(TEXTS))
    write_table(tmp_path / "dump/train/utt2label", dict.fromkeys(TEXTS, "1"))
    words = ["--data-dir", str(data), "--output-dir", str(tmp_path / "audit")]
    words += ["--clean-data-dir", str(tmp_path / "data/clean"), "--dump-dir", str(tmp_path / "dump/train")]
    audit_transcripts.main([*words, "--clean-dump-dir", str(tmp_path / "dump/clean")])
    assert "5 of 7 clips are suspicious; 2 of these fit another clip; 2 of 3 videos" in capsys.readouterr().out
    rows = (tmp_path / "audit/audit.tsv").read_text().splitlines()
    assert len(rows) == 8 and all(len(r.split("\t")) == 10 for r in rows)
    videos = [line.split("\t") for line in (tmp_path / "audit/videos.tsv").read_text().splitlines()[1:]]
    assert {v[0]: v[-1] for v in videos} == {
        "moved": "times moved against the text",
        "other": "nothing heard: no speech, or another language",
        "good": "fine",
    }
    clean = load_kaldi_dir(tmp_path / "data/clean")
    assert clean.utterances == ["good-0", "good-1"] and list(clean.wav) == ["good"]
    assert load_dump(tmp_path / "dump/clean").utterances == ["good-0", "good-1"]
    assert len((tmp_path / "dump/clean/dropped.tsv").read_text().splitlines()) == 5
    assert len(load_kaldi_dir(data).utterances) == 7


def test_leave_out_refuses_to_empty_a_set(tmp_path):
    data = data_dir(tmp_path / "data")
    with pytest.raises(UserError, match="no utterance would be left"):
        leave_out(data, tmp_path / "new", dict.fromkeys(TEXTS, "x"))
    with pytest.raises(UserError, match="another folder"):
        leave_out(data, data, {"good-0": "x"})


def test_without_recognised_text(tmp_path):
    data = data_dir(tmp_path / "data")
    (data / "text_asr").unlink()
    with pytest.raises(UserError, match="stage 2"):
        audit_transcripts.main(["--data-dir", str(data), "--output-dir", str(tmp_path)])


@pytest.mark.parametrize("profile", ["large", "small"])
def test_the_recipe_s_models_are_those_that_are_fetched(tmp_path, profile):
    """`--models` of the recipe and `--profile` name the same folders, and settings that are there."""
    fetched = subprocess.run(
        [ROOT / "tools/fetch_models.sh", "--dry-run", "--profile", profile, "--dir", "/m"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    folders = [line.split("--local-dir /m/")[1].split()[0] for line in fetched.splitlines()]
    recipe = tmp_path / "egs/r"
    (tmp_path / "tools").mkdir()
    recipe.mkdir(parents=True)
    (tmp_path / "tools/setup_env.sh").write_text("")
    (recipe / "sdumc.sh").write_text('#!/usr/bin/env bash\n[[ $1 == --help ]] || printf "%s\\n" "$@"\n')
    for path in (tmp_path / "tools/setup_env.sh", recipe / "sdumc.sh"):
        path.chmod(0o755)
    for name in ("conf", "utils"):
        (recipe / name).symlink_to((ROOT / "egs/mosei" / name).resolve())
    shutil.copy(ROOT / "egs/mosei/run.sh", recipe / "run.sh")

    def words(*options: str) -> list[str]:
        done = subprocess.run([recipe / "run.sh", *options], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    given = words("--source", "raw", "--models", profile)
    options = dict(zip(given[::2], given[1::2], strict=True))
    names = ("--encoder", "--llm", "--asr-model", "--vision-model")
    assert [Path(options[name]).name for name in names] == folders
    small = profile == "small"
    assert (options.get("--missing-text"), options.get("--dumpdir")) == (
        ("asr", "dump/small") if small else (None, None)
    )
    configs = [value for name, value in options.items() if name.endswith("-config")]
    assert len(configs) == (6 if small else 0) and all((recipe / c).is_file() for c in configs)
    without = words("--source", "toolkit", "--pickle", "p", "--models", profile)
    assert "--missing-text" not in without and "dump/toolkit" in without


def test_fetch_models_dry_run():
    command = [str(ROOT / "tools/fetch_models.sh"), "--dry-run", "--models", "whisper-small", "--dir", "/m"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert " download openai/whisper-small --local-dir /m/whisper-small " in done.stdout
    done = subprocess.run([*command[:-4], "--models", "nothing"], capture_output=True, text=True)
    assert done.returncode == 2 and "--list" in done.stderr
