"""egs/mini end to end at reduced size: every stage, a second run, deleted outputs, repeatability."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.recipes import call_recipe, make_small_mini

from sdumc import Scorer
from sdumc.data.dump import load_dump
from sdumc.data.tables import read_table

CONDITIONS = ("full", "missing", "asr", "none")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """egs/mini in a repository of its own, with small settings."""
    return make_small_mini(tmp_path_factory.mktemp("mini"))


def call(recipe: Path, *words: object) -> str:
    return call_recipe(recipe, "--ngpu", 0, "--nproc", 2, *words)


@pytest.fixture(scope="module")
def first_run(recipe) -> str:
    return call(recipe)


def test_every_stage_leaves_what_the_next_needs(recipe, first_run):
    assert [line.split(":")[0] for line in first_run.splitlines() if line.startswith("stage ")] == [
        f"stage {i}" for i in range(7)
    ]
    for name, count in (("train", 24), ("valid", 6), ("test", 6)):
        dump = load_dump(recipe / "dump" / name)
        assert len(dump.utterances) == count
        assert set(dump.features) == {"audio", "text", "text_sim", "text_asr", "video"}
        quality = json.loads((recipe / "dump" / name / "text_sim.quality.json").read_text())
        assert quality["n"] == count and quality["wer"] is not None
    exp = recipe / "exp" / "train_seed1"
    for condition in CONDITIONS:
        score = json.loads((exp / "decode_test" / condition / "score.json").read_text())
        assert score["n"] == 6 and score["mae"] > 0
    for name in ("config.yaml", "train.log", "metrics.jsonl", "checkpoint.pt", "model.valid-best.safetensors"):
        assert (exp / name).exists()
    text = (recipe / "RESULTS.md").read_text()
    assert all(condition in text for condition in CONDITIONS)
    assert "missing: simulated text (projector trained on another set, pretrain)" in text
    assert not (recipe / "dump" / "pretrain").exists()
    assert (recipe / "exp" / "train" / "report.html").stat().st_size > 100_000


def test_single_clips_score_as_in_decoding(recipe, first_run, monkeypatch):
    monkeypatch.chdir(recipe)
    clips = read_table("data/test/wav.scp")
    lines = Path("exp/train_seed1/decode_test/missing/predictions.tsv").read_text().splitlines()[1:]
    scorer = Scorer.load("exp/train_seed1", device="cpu")
    for line in lines[::2]:
        utt, value, _ = line.split("\t")
        assert scorer.score(clips[utt]).overall == pytest.approx(float(value), abs=1e-4), utt


def test_a_second_run_does_nothing_and_says_so(recipe, first_run):
    output = call(recipe)
    assert "skip" in output and "  run " not in output


def test_a_deleted_output_is_made_again_and_so_is_what_depends_on_it(recipe, first_run, warm):
    before = (recipe / "exp/train_seed1/decode_test/full/predictions.tsv").read_bytes()
    shutil.rmtree(recipe / "exp" / "train_seed1")
    output = call(recipe, "--stage", 3)
    ran = [line.split()[1] for line in output.splitlines() if line.startswith("  run ")]
    assert ran[0] == "train" and {"decode", "score", "report"} & {r.rstrip(",") for r in ran} and "audio" not in ran
    # The same seed on the same machine: the same numbers.
    assert (recipe / "exp/train_seed1/decode_test/full/predictions.tsv").read_bytes() == before


def test_features_from_elsewhere_start_at_stage_4(recipe, first_run, warm):
    for name in ("train", "valid", "test"):
        shutil.copytree(recipe / "dump" / name, recipe / "elsewhere" / name)
        for extra in ("audio.yaml", "audio.frames", "utt2spk"):
            (recipe / "elsewhere" / name / extra).unlink()
    words = ["--nproc", 1, "--stage", 4, "--stop-stage", 5, "--dumpdir", "elsewhere", "--datadir", "nowhere"]
    call(recipe, *words, "--exp-tag", "other", "--encoder", "", "--llm", "", "--conditions", "full none")
    assert (recipe / "exp/other_seed1/decode_test/none/score.json").exists()
