"""Training on the dumps of several corpora at once: weights, scales, names, ranks, kills, and what is said of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import tiny_models
from helpers.commands import call_here, script_here
from helpers.dumps import make_dump
from helpers.stopping import at_step

from sdumc.data.batches import UtteranceDataset
from sdumc.data.dump import load_dump
from sdumc.data.tables import read_table, write_table
from sdumc.errors import UserError
from sdumc.scale import parse_scale
from sdumc.training.checkpoint import load_model
from sdumc.training.data import join_dumps

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SMALL = ["--dim", "16", "--content-dim", "8", "--batch-size", "8", "--lr", "1e-3", "--epochs", "3", "--save-every", "2"]
STARS = parse_scale("1 5")


def rescale(dump: Path) -> None:
    """Give a dump of CMU's scale labels from 1 to 5."""
    labels = read_table(dump / "utt2label")
    write_table(dump / "utt2label", {u: f"{STARS.from_network(float(y)):.4f}" for u, y in labels.items()})
    STARS.write(dump)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two corpora whose utterances have the same names; the second has no video, and stars from 1 to 5."""
    root = tmp_path_factory.mktemp("home")
    make_dump(root / "dump/train", 20, 1)
    make_dump(root / "other", 25, 2, ("audio", "text", "text_sim"))
    make_dump(root / "dump/valid", 11, 3)
    make_dump(root / "dump/test", 12, 4)
    rescale(root / "other")
    return root


def args(home: Path, exp: Path, *more: object) -> list[str]:
    dirs = ["--train-dir", home / "dump/train", home / "other", "--train-weights", "1", "0.5"]
    return [*map(str, [*dirs, "--valid-dir", home / "dump/valid", "--exp-dir", exp, *SMALL, *more])]


def call(*words: str, ranks: int = 1, env: dict[str, str] = ENV) -> subprocess.CompletedProcess:
    launcher = [str(ROOT / "utils/ranks.py"), str(ranks), sys.executable] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, "-m", "sdumc.bin.train", *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory):
    exp = tmp_path_factory.mktemp("exp") / "joint_seed1"
    done = call(*args(home, exp))
    assert done.returncode == 0, done.stderr
    return exp, done.stderr


def test_what_is_said(home, trained):
    exp, log = trained
    assert f"{home}/other: has no video" in log
    assert f"{home}/other: labels from 1 to 5 are mapped linearly to -3 to 3" in log
    assert f"learned from {home}/dump/train with weight 1: 20 utterances, 62% of what is drawn" in log
    assert f"learned from {home}/other with weight 0.5: 25 utterances, 38% of what is drawn" in log
    config = yaml.safe_load((exp / "config.yaml").read_text())
    assert config["train-dir"] == [f"{home}/dump/train", f"{home}/other"] and config["train-weights"] == [1.0, 0.5]
    said = yaml.safe_load((exp / "train_sets.yaml").read_text())
    assert [(s["utterances"], s["share"], s["labels"]) for s in said] == [(20, 1.0, "-3 to 3"), (25, 0.5, "1 to 5")]
    assert (exp / "scale.yaml").read_text() == "low: -3\nhigh: 3\nclasses: cmu\n"
    again = call(*args(home, exp, "--config", str(exp / "config.yaml")))  # what it wrote is what it reads
    assert again.returncode == 0, again.stderr


def score_and_report(exp: Path, name: str, home: Path, output: Path) -> tuple[str, str, str]:
    """Decode and score home/dump/NAME, and report on it; returns what decoding logs, the table and the page."""
    dump, decoded, logs = home / "dump" / name, exp / f"decode_{name}", []
    commands: list[list[object]] = [
        ["decode", "--exp-dir", exp, "--data-dir", dump, "--output-dir", decoded, "--condition", "full", "missing"]
    ]
    for c in ("full", "missing"):
        tables = ["--predictions", decoded / c / "predictions.tsv", "--output", decoded / c / "score.json"]
        commands.append(["score", *tables])
    places = ["--data-root", home / "data", "--dump-root", home / "dump", "--output-dir", output]
    commands.append(["report", "--exp-dirs", exp, "--test-sets", name, *places])
    for words in commands:
        done = call_here(*map(str, words))
        assert done.returncode == 0, done.stderr
        logs.append(done.stdout + done.stderr)
    return "".join(logs[:-1]), (output / "RESULTS.md").read_text(), (output / "report.html").read_text()


def test_the_report_says_so(home, trained, tmp_path):
    log, *texts = score_and_report(trained[0], "test", home, tmp_path)
    for text in texts:
        assert "with weight 0.5: 25 utterances, 38% of what is drawn; labels from 1 to 5, mapped" in text
        assert f"Ridge regression and the median are of {home}/dump/train alone." in text
        assert "the model was trained on labels" not in text.lower()
    assert "the model was trained on labels" not in log


def test_a_model_of_another_corpus_is_said_to_be_one(home, trained, tmp_path):
    """Its predictions are mapped to this corpus's scale: decoding, scoring, the table and the report say so."""
    for number, name in enumerate(("train", "valid", "test")):
        rescale(make_dump(tmp_path / "dump" / name, 12, 7 + number))
    exp = tmp_path / "exp/foreign_seed1"
    shutil.copytree(trained[0], exp)
    log, *texts = score_and_report(exp, "test", tmp_path, tmp_path / "report")
    words = "he model was trained on labels from -3 to 3; its predictions are mapped linearly to 1 to 5"
    assert log.count(words) == 3  # decoding once, each of two scores
    for text in texts:
        assert words in text and f"were trained on {home}/dump/train, not on {tmp_path}/dump/train" in text
    assert words in script_here(ROOT / "utils/show_results.py", exp / "decode_test").stdout
    said = yaml.safe_load((exp / "decode_test/full/condition.yaml").read_text())
    assert said["labels-mapped-from"] == "-3 to 3"
    assert json.loads((exp / "decode_test/full/score.json").read_text())["mapped_from"] == "-3 to 3"


def test_its_pack_names_no_folder_of_this_machine(home, trained, tmp_path):
    exp = tmp_path / "joint"
    shutil.copytree(trained[0], exp)
    config = yaml.safe_load((exp / "config.yaml").read_text())
    (exp / "config.yaml").write_text(yaml.safe_dump({**config, "init": f"{home}/somewhere"}))
    vision = tiny_models.vit(tmp_path / "vit")
    told = {"model": str(vision), "pooling": "cls", "frame_rate": 5, "detector": "none", "face_margin": 0.2}
    (exp / "extractors.yaml").write_text(yaml.safe_dump({"video": {**told, "min_face": 0.1, "dtype": "fp32"}}))
    done = call_here("pack", "--exp-dir", exp, "--output", tmp_path / "pack")
    assert done.returncode == 0, done.stderr
    assert "hf upload OWNER/pack" in done.stderr
    for file in ("config.yaml", "extractors.yaml", "README.md"):
        assert str(home) not in (tmp_path / "pack" / file).read_text(), file
    assert load_model(tmp_path / "pack").available == ("audio", "text", "video")


def test_killed_and_run_again_ends_with_the_same_bytes(home, trained, tmp_path):
    exp, _ = trained
    killed = call(*args(home, tmp_path / "exp"), env=at_step(ENV, 7, signal.SIGKILL))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert call(*args(home, tmp_path / "exp")).returncode == 0
    for name in ("model.valid-best.safetensors", "model.averaged.safetensors", "metrics.jsonl", "train_sets.yaml"):
        assert (exp / name).read_bytes() == (tmp_path / "exp" / name).read_bytes(), name
    changed = call_here("train", *args(home, tmp_path / "exp", "--train-weights", "1", "1"))
    assert changed.returncode == 1 and "train_weights: [1.0, 0.5] -> [1.0, 1.0]" in changed.stderr


def test_two_ranks_learn_what_one_learns(home, tmp_path):
    plain = ["--dropout", "0", "--attention-dropout", "0", "--modality-dropout", "0"]
    for ranks in (1, 2):
        done = call(*args(home, tmp_path / str(ranks), *plain), ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = ([json.loads(x) for x in (tmp_path / r / "metrics.jsonl").open()] for r in "12")
    for a, b in zip(one, two, strict=True):
        assert b["train"]["loss"] == pytest.approx(a["train"]["loss"], rel=1e-4)
        assert b["valid"]["full"]["mae"] == pytest.approx(a["valid"]["full"]["mae"], rel=1e-4)


def test_joined(home):
    a, b = load_dump(home / "dump/train"), load_dump(home / "other")
    both = join_dumps([a, b])
    assert len(both.utterances) == len(set(both.utterances)) == 45 and both.sizes == [20, 25]
    for i, utt in enumerate(a.utterances):
        assert both.labels[both.utterances[i]] == a.labels[utt]
    for i, utt in enumerate(b.utterances, start=20):
        assert STARS.to_network(b.labels[utt]) == pytest.approx(both.labels[both.utterances[i]])
        assert both.place(both.utterances[i]) == (home / "other", utt)
        assert both.utterances[i] in both.features["video"].absent
    theirs, ours = UtteranceDataset(b, ["text"]), UtteranceDataset(both, ["text", "video"])
    assert ours[20].features["text"].equal(theirs[0].features["text"]) and ours[20].features["video"] is None


def test_a_damaged_matrix_names_its_own_folder(home, tmp_path):
    make_dump(tmp_path / "other", 6, 2)
    ark = next((tmp_path / "other/ark").glob("text.*"))
    content = bytearray(ark.read_bytes())
    both = join_dumps([load_dump(home / "dump/train"), load_dump(tmp_path / "other")])
    entry = both.features["text"].entries[both.utterances[20]]
    start = int(entry.rpartition(":")[2]) + 15
    content[start : start + 8] = b"\x00\x00\xc0\x7f" * 2  # NaN
    ark.write_bytes(content)
    with pytest.raises(UserError, match=f"{tmp_path}/other/text.scp: utterance 'spk0-000'.*NaN"):
        _ = UtteranceDataset(both, ["text"])[20]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train-weights", "1"], "--train-weights: 1 for 2 --train-dir; give one for each"),
        (["--train-weights", "1", "0"], "must be finite and above 0"),
        (["--train-weights", "1", "inf"], "must be finite and above 0"),
        (["wide"], "wide/text.scp: dimension 6, but 10 in {home}/dump/train/text.scp"),
        (["nowhere"], "nowhere: no such dump folder"),
        (["classes"], "which look like numbers of classes"),
    ],
)
def test_what_cannot_be_joined(home, tmp_path, words, message):
    wide = make_dump(tmp_path / "wide", 6, 2, ("audio",))
    for table in wide.glob("audio*"):
        table.rename(table.with_name(table.name.replace("audio", "text")))
    classes = make_dump(tmp_path / "classes", 24, 2)
    write_table(classes / "utt2label", {u: str(i % 3) for i, u in enumerate(read_table(classes / "utt2label"))})
    dirs = [home / "dump/train", home / "other" if words[0].startswith("--") else tmp_path / words[0]]
    done = call_here(
        *["train", "--train-dir", *dirs, "--valid-dir", home / "dump/valid", "--exp-dir", tmp_path / "exp", *SMALL],
        *(words if words[0].startswith("--") else []),
    )
    assert done.returncode == 1 and message.format(home=home) in done.stderr, done.stderr
