"""Training and decoding as users call them: ranks, kills, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.commands import call_here
from helpers.dumps import make_dump
from helpers.stopping import at_step

from sdumc.data.batches import UtteranceDataset, collate

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SMALL = ["--dim", "16", "--content-dim", "8", "--batch-size", "8", "--lr", "1e-3", "--epochs", "4", "--save-every", "2"]
GUARD = 900  # seconds: more than any command here needs on a busy machine


def command(module: str, *args: object, ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, "-m", f"sdumc.bin.{module}", *map(str, args)]


def call(*args: object, ranks: int = 1, env: dict[str, str] = ENV) -> subprocess.CompletedProcess:
    """In a process of its own, or several."""
    return subprocess.run(command(*args, ranks=ranks), env=env, capture_output=True, text=True, timeout=GUARD)


def train_args(data: Path, exp: Path, *more: object) -> list[object]:
    dirs = ["--train-dir", data / "train", "--valid-dir", data / "valid", "--exp-dir", exp]
    return ["train", *dirs, *SMALL, *more]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    # 41 utterances in batches of 8: an uneven end, and on 2 ranks uneven shares.
    make_dump(root / "train", 41, 1, absent={"video": {3, 4}, "text_sim": {7}, "text": {9}})
    make_dump(root / "valid", 11, 2)
    return root


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    exp = tmp_path_factory.mktemp("exp") / "undisturbed"
    done = call(*train_args(data, exp))
    assert done.returncode == 0, done.stderr
    return exp


FINAL = ("model.valid-best.safetensors", "model.averaged.safetensors", "metrics.jsonl", "config.yaml")


def assert_same_result(a: Path, b: Path, names=FINAL):
    for name in names:
        if name == "config.yaml":  # names its own exp folder
            drop = [line for line in (a / name).read_text().splitlines() if not line.startswith("exp-dir")]
            assert drop == [line for line in (b / name).read_text().splitlines() if not line.startswith("exp-dir")]
        else:
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_same_seed_same_bytes_and_another_seed_others(data, undisturbed, tmp_path):
    assert call(*train_args(data, tmp_path / "same")).returncode == 0
    assert_same_result(undisturbed, tmp_path / "same")
    assert call_here(*train_args(data, tmp_path / "other", "--seed", 2)).returncode == 0
    name = "model.valid-best.safetensors"
    assert (undisturbed / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize("step", [3, 6, 17])
def test_killed_and_run_again_ends_with_the_same_bytes(data, undisturbed, tmp_path, step):
    exp = tmp_path / "killed"
    # Six steps an epoch, a checkpoint every two: killed between two checkpoints, at the end of an epoch, in the third.
    killed = call(*train_args(data, exp), env=at_step(ENV, step, signal.SIGKILL))
    assert killed.returncode == -signal.SIGKILL and last_step(exp) == (step - 1) // 2 * 2, killed.stderr
    again = call_here(*train_args(data, exp))
    assert again.returncode == 0, again.stderr
    assert_same_result(undisturbed, exp)


def last_step(exp: Path) -> int:
    import torch

    return torch.load(exp / "checkpoint.pt", weights_only=True)["step"]


def test_a_signal_saves_and_asks_for_another_turn(data, undisturbed, tmp_path):
    exp = tmp_path / "stopped"
    stopped = call(*train_args(data, exp), env=at_step(ENV, 3, signal.SIGUSR1))
    # What the ranks agree on with the next step's gradients takes effect after that step.
    assert stopped.returncode == 75 and last_step(exp) in (3, 4), stopped.stderr
    assert call_here(*train_args(data, exp)).returncode == 0
    assert_same_result(undisturbed, exp)


def test_two_ranks_learn_what_one_learns(data, tmp_path):
    plain = ["--dropout", 0, "--attention-dropout", 0, "--modality-dropout", 0]
    for done in (
        call_here(*train_args(data, tmp_path / "1", *plain)),
        call(*train_args(data, tmp_path / "2", *plain), ranks=2),
    ):
        assert done.returncode == 0, done.stderr
    one, two = ([json.loads(x) for x in (tmp_path / r / "metrics.jsonl").open()] for r in "12")
    for a, b in zip(one, two, strict=True):
        for name, value in a["train"].items():
            assert b["train"][name] == pytest.approx(value, rel=1e-4), name
        assert b["valid"]["full"]["mae"] == pytest.approx(a["valid"]["full"]["mae"], rel=1e-4)
        assert b["valid"]["full"]["n"] == 11


def test_more_ranks_than_utterances_in_the_last_batch(data, tmp_path):
    done = call(*train_args(data, tmp_path / "exp", "--batch-size", 1, "--epochs", 1), ranks=2)
    assert done.returncode == 0, done.stderr


def test_a_changed_setting_is_refused_with_the_difference(data, undisturbed):
    done = call_here(*train_args(data, undisturbed, "--lr", "5e-4"))
    assert done.returncode == 1
    assert "lr: 0.001 -> 0.0005" in done.stderr and "Traceback" not in done.stderr


def test_an_unknown_key_in_yaml_is_refused(data, tmp_path):
    (tmp_path / "c.yaml").write_text("learning-rate: 1\n")
    done = call_here(*train_args(data, tmp_path / "exp", "--config", tmp_path / "c.yaml"))
    assert done.returncode == 2 and "c.yaml" in done.stderr and "learning-rate" in done.stderr


def test_a_loss_that_is_not_finite_names_the_utterances(data, tmp_path):
    done = call_here(*train_args(data, tmp_path / "exp", "--lr", "1e20", "--warmup-epochs", 0))
    assert done.returncode == 1
    assert "not finite" in done.stderr and "spk" in done.stderr and "Traceback" not in done.stderr


def test_decoding_every_condition(data, undisturbed, tmp_path):
    conditions = ["full", "missing", "asr", "none", "audio", "text", "video", "audio+text", "audio+video", "text+video"]
    args = ["--exp-dir", undisturbed, "--data-dir", data / "valid", "--output-dir"]
    done = call_here("decode", *args, tmp_path / "all", "--condition", *conditions)
    assert done.returncode == 0, done.stderr
    tables = {c: (tmp_path / "all" / c / "predictions.tsv").read_text().splitlines() for c in conditions}
    assert tables["full"][0] == "utt_id\tprediction\tlabel"
    assert all(len(t) == 12 for t in tables.values())
    assert tables["none"] == tables["audio+video"] != tables["missing"]
    ids = [line.split("\t")[0] for line in tables["full"][1:]]
    assert ids == sorted(ids)
    done = call_here("decode", *args, tmp_path / "one", "--condition", "full", "--batch-size", 1)
    assert done.returncode == 0, done.stderr
    alone = [float(x.split("\t")[1]) for x in (tmp_path / "one/predictions.tsv").read_text().splitlines()[1:]]
    np.testing.assert_allclose(alone, [float(x.split("\t")[1]) for x in tables["full"][1:]], atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_predictions_do_not_depend_on_the_number_of_ranks(data, undisturbed, ranks):
    """What evaluation does on each rank; on 16 ranks some have no utterance."""
    from sdumc.scoring.decoding import decode, load_for
    from sdumc.training.checkpoint import load_model

    model, dump = load_model(undisturbed, "averaged"), load_for(data / "valid", ["full", "missing"])
    for condition in ("full", "missing"):
        whole = decode(model, dump, condition)
        parts = [decode(model, dump, condition, share=(rank, ranks)) for rank in range(ranks)]
        found = {u: float(p) for part in parts for u, p in zip(part.ids, part.prediction, strict=True)}
        assert sorted(found) == whole.ids and sum(len(part.ids) for part in parts) == len(whole.ids)
        np.testing.assert_allclose([found[u] for u in whole.ids], whole.prediction, atol=1e-5)


def test_missing_without_simulated_text_means_none(undisturbed, tmp_path):
    make_dump(tmp_path / "dump", 6, 3, names=("audio", "video"))
    args = ["--exp-dir", undisturbed, "--data-dir", tmp_path / "dump", "--output-dir", tmp_path / "out"]
    done = call_here("decode", *args, "--condition", "missing", "none")
    assert done.returncode == 0 and "means the same as none" in done.stderr
    a, b = ((tmp_path / "out" / c / "predictions.tsv").read_text() for c in ("missing", "none"))
    assert a == b
    done = call_here("decode", *args, "--condition", "full")
    assert done.returncode == 1 and "text.scp" in done.stderr and "Traceback" not in done.stderr


def scored(exp: Path, dump: Path, conditions: list[str]) -> str:
    """Decode and score ``dump`` into EXP/decode_test; returns the log."""
    done = call_here(
        "decode", "--exp-dir", exp, "--data-dir", dump, "--output-dir", exp / "decode_test", "--condition", *conditions
    )
    assert done.returncode == 0, done.stderr
    for condition in conditions:
        table = exp / "decode_test" / condition / "predictions.tsv"
        assert call_here("score", "--predictions", table, "--output", table.with_name("score.json")).returncode == 0
    return done.stderr


def test_the_missing_flow_learns_from_asr_text(data, tmp_path):
    """Beside one with simulated text: log, decode output, report and comparison say which text `missing` read."""
    make_dump(tmp_path / "dump/test", 12, 3)
    conditions = ["full", "missing", "asr", "none"]
    simulated, asr = tmp_path / "exp/train_seed1", tmp_path / "exp/train_missing_asr_seed1"
    for exp, more in ((simulated, ()), (asr, ("--missing-text", "asr"))):
        done = call_here(*train_args(data, exp, "--epochs", 2, *more))
        assert done.returncode == 0, done.stderr
        assert f"text of the missing flow: {'ASR' if more else 'simulated'} text" in done.stderr
    assert "missing: 12 utterances (audio, simulated text, video)" in scored(
        simulated, tmp_path / "dump/test", conditions
    )
    assert "missing: 12 utterances (audio, ASR text, video)" in scored(asr, tmp_path / "dump/test", conditions)
    said = {c: yaml.safe_load((asr / "decode_test" / c / "condition.yaml").read_text()) for c in conditions}
    assert said["missing"] == {
        "condition": "missing",
        "flow": "missing",
        "features": ["audio", "text_asr", "video"],
        "text": "ASR text",
    }
    assert said["asr"] == {**said["missing"], "condition": "asr", "flow": "complete"} and said["none"]["text"] == "none"

    from sdumc.scoring.decoding import decode, load_for, run_batch
    from sdumc.training.checkpoint import load_model

    # The text reaches the missing flow: the network's own answer to it, and another than to no text.
    model, dump = load_model(asr), load_for(tmp_path / "dump/test", ["missing"], ["asr"])
    found = decode(model, dump, "missing")
    batch = collate([UtteranceDataset(dump, ["audio", "text_asr", "video"])[i] for i in range(12)])
    inputs = {"audio": "audio", "text_sim": "text_asr", "video": "video"}
    own = run_batch(model, batch, inputs, "missing").prediction.detach().numpy()
    np.testing.assert_allclose(found.prediction, own, atol=1e-5)
    assert np.abs(found.prediction - decode(model, dump, "none").prediction).max() > 1e-3

    words = ["--data-root", tmp_path / "data", "--dump-root", tmp_path / "dump", "--test-sets", "test"]
    done = call_here(
        "report", "--exp-dirs", asr, *words, "--output-dir", tmp_path / "r", "--results", tmp_path / "R.md"
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "R.md").read_text()
    assert "| missing: ASR text, missing flow |" in text and "| asr: ASR text |" in text
    assert "missing-text: asr" in text and "imulated text recovers" not in text
    done = call_here("report", "--exp-dirs", simulated, asr, *words, "--output-dir", tmp_path / "both")
    assert done.returncode == 1 and "both seed 1" in done.stderr
    config = asr / "config.yaml"
    config.write_text(config.read_text().replace("seed: 1\n", "seed: 2\n"))
    done = call_here("report", "--exp-dirs", simulated, asr, *words, "--output-dir", tmp_path / "both")
    assert done.returncode == 1 and "missing-text simulated" in done.stderr and "sdumc.bin.compare" in done.stderr
    names = [str(exp).removesuffix("_seed1") for exp in (simulated, asr)]
    done = call_here("compare", "--experiments", *names, "--conditions", *conditions, "--data-root", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    assert "What `missing` reads: simulated text in train; ASR text, missing flow in train_missing_asr." in done.stdout


def test_no_asr_text_where_it_is_asked_for(data, tmp_path):
    for name in ("train", "valid"):
        make_dump(tmp_path / name, 8, 1, names=("audio", "text", "text_sim"))
    done = call_here(*train_args(tmp_path, tmp_path / "exp", "--missing-text", "asr"))
    assert done.returncode == 1 and "text_asr.scp: missing, but --missing-text asr needs it" in done.stderr


@pytest.mark.parametrize("without", ["train", "valid", "test"])
def test_a_modality_that_a_whole_set_lacks(tmp_path, without):
    """No face in a single clip of one set: training, decoding and the report go on."""
    for seed, name in enumerate(("train", "valid", "test")):
        make_dump(tmp_path / "dump" / name, 12, seed, absent={"video": set(range(12))} if name == without else None)
    exp = tmp_path / "exp/small_seed1"
    done = call_here(*train_args(tmp_path / "dump", exp, "--epochs", "1"))
    assert done.returncode == 0, done.stderr
    assert ("video-dim: 0" in (exp / "config.yaml").read_text()) == (without == "train")
    scored = ["--data-dir", tmp_path / "dump/test", "--output-dir", exp / "decode_test"]
    done = call_here("decode", "--exp-dir", exp, *scored, "--condition", "full", "missing", "none", "audio")
    assert done.returncode == 0, done.stderr
    for condition in ("full", "missing", "none", "audio"):
        folder = exp / "decode_test" / condition
        done = call_here("score", "--predictions", folder / "predictions.tsv", "--output", folder / "score.json")
        assert done.returncode == 0, done.stderr
    same = [(exp / "decode_test" / c / "predictions.tsv").read_text() for c in ("none", "audio")]
    assert (same[0] == same[1]) == (without != "valid")  # no video: nothing left but the sound
    done = call_here("decode", "--exp-dir", exp, *scored, "--condition", "video")
    assert done.returncode == (0 if without == "valid" else 1) and "Traceback" not in done.stderr
    words = ["--data-root", tmp_path / "data", "--dump-root", tmp_path / "dump", "--output-dir", tmp_path / "report"]
    done = call_here("report", "--exp-dirs", exp, *words, "--results", tmp_path / "RESULTS.md", "--test-sets", "test")
    assert done.returncode == 0, done.stderr
