"""Corpora that lack modalities: what is trained, what chooses the epoch, and what is scored."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from helpers.commands import call_here
from helpers.dumps import make_dump

from sdumc.conditions import in_words, possible_conditions
from sdumc.data.tables import read_table, write_table
from sdumc.scale import CMU, parse_scale
from sdumc.scoring.metrics import read_predictions
from sdumc.training.checkpoint import load_model

SMALL = [
    "--dim",
    "16",
    "--content-dim",
    "8",
    "--batch-size",
    "8",
    "--num-workers",
    "1",
    "--lr",
    "0.003",
    "--warmup-epochs",
    "1",
    "--device",
    "cpu",
]
EVERYTHING = ["full", "missing", "asr", "none", "audio", "text", "video"]


def train(tmp_path: Path, *words: str, epochs: int = 2):
    done = call_here(
        "train",
        *["--train-dir", tmp_path / "train", "--valid-dir", tmp_path / "valid", "--exp-dir", tmp_path / "exp"],
        *["--epochs", epochs, *SMALL, *words],
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, yaml.safe_load((tmp_path / "exp/config.yaml").read_text())


def last_epoch(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "exp/metrics.jsonl").read_text().splitlines()[-1])


def decode(tmp_path: Path, dump: Path, *conditions: str):
    out = tmp_path / "out"
    done = call_here(
        "decode",
        *["--exp-dir", tmp_path / "exp", "--data-dir", dump, "--output-dir", out, "--device", "cpu"],
        *["--condition", *conditions],
    )
    return done, out


@pytest.mark.parametrize(
    ("features", "flows", "chosen", "terms", "possible"),
    [
        (("text",), "complete", {"full"}, {"mse_complete", "contrast"}, ["full", "missing", "asr", "text"]),
        (
            ("audio", "video"),
            "missing",
            {"missing"},
            {"mse_missing", "contrast"},
            ["missing", "none", "audio", "video"],
        ),
        (("audio",), "missing", {"missing"}, {"mse_missing", "contrast"}, ["missing", "none", "audio"]),
        (("audio", "text_sim"), "missing", {"missing"}, {"mse_missing", "contrast"}, ["missing", "none", "audio"]),
    ],
    ids=["text alone", "no text", "sound alone", "simulated text, no real text"],
)
def test_one_flow(tmp_path, features, flows, chosen, terms, possible):
    for number, name in enumerate(("train", "valid")):
        make_dump(tmp_path / name, 16, number, features)
    make_dump(tmp_path / "test", 16, 2)  # has everything
    log, config = train(tmp_path)
    assert config["flows"] == flows and f"{flows} flow alone, of {in_words(features)}" in log
    assert last_epoch(tmp_path)["valid"].keys() == chosen
    assert set(last_epoch(tmp_path)["train"]) == terms | {"loss"}
    assert possible_conditions(tmp_path / "test", EVERYTHING, exp_dir=str(tmp_path / "exp")) == possible
    done, out = decode(tmp_path, tmp_path / "test", *possible)
    assert done.returncode == 0, done.stderr
    assert f"{possible[0]}: 16 utterances ({in_words(features)})" in done.stderr
    assert len(read_predictions(out / possible[0] / "predictions.tsv").ids) == 16
    if flows == "missing" and "text_sim" not in features:
        assert "text" not in load_model(tmp_path / "exp").available
        done, _ = decode(tmp_path, tmp_path / "test", "full")
        assert done.returncode == 1 and "the model was made without" in done.stderr


def test_text_in_part_and_none_in_valid(tmp_path):
    make_dump(tmp_path / "train", 24, 0, ("audio", "text", "video"), {"text": set(range(0, 24, 2))})
    make_dump(tmp_path / "valid", 12, 1, ("audio", "video"))
    log, config = train(tmp_path)
    assert "12 of 24 train utterances have no real text" in log and config["flows"] == "both"
    assert "the epoch is chosen under missing" in log and last_epoch(tmp_path)["valid"].keys() == {"missing"}
    assert {"mse_complete", "mse_missing", "similarity"} <= last_epoch(tmp_path)["train"].keys()


@pytest.mark.parametrize(
    ("features", "words", "message"),
    [
        (("audio", "video"), ["--flows", "complete"], "text.scp: missing; the complete flow learns from real text"),
        (("text",), ["--flows", "missing"], "has not what this flow reads"),
    ],
)
def test_flows_that_cannot_be(tmp_path, features, words, message):
    for number, name in enumerate(("train", "valid")):
        make_dump(tmp_path / name, 8, number, features)
    done = call_here(
        "train",
        *["--train-dir", tmp_path / "train", "--valid-dir", tmp_path / "valid", "--exp-dir", tmp_path / "exp"],
        *[*SMALL, *words],
    )
    assert done.returncode == 1 and message in done.stderr


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (("audio", "text", "video"), "audio, real text, video"),
        (("text",), "real text only"),
        (("audio", "text_sim"), "audio and simulated text"),
        (("video", "audio"), "audio and video, no text"),
    ],
)
def test_in_words(features, words):
    assert in_words(features) == words


def test_a_corpus_of_another_scale(tmp_path):
    """Labels from 1 to 5 are learned as the same ones from -3 to 3 are, and predictions come back from 1 to 5."""
    stars, found = parse_scale("1 5 nearest"), {}
    for scale in (CMU, stars):
        home = tmp_path / scale.scheme
        for number, (name, count) in enumerate((("train", 24), ("valid", 16))):
            make_dump(home / name, count, number)
            table = read_table(home / name / "utt2label")
            write_table(home / name / "utt2label", {u: scale.from_network(float(y)) for u, y in table.items()})
            scale.write(home / name)
        log, _ = train(home, "--dropout", "0", "--attention-dropout", "0")
        assert f"labels from {scale.named_ends}" in log
        assert (home / "exp/scale.yaml").read_text() == (home / "train/scale.yaml").read_text()
        done, out = decode(home, home / "valid", "full", "missing")
        assert done.returncode == 0, done.stderr
        found[scale.scheme] = read_predictions(out / "full/predictions.tsv").predictions
    assert found["nearest"] == pytest.approx(stars.from_network(found["cmu"]), abs=2e-2)
    valid = last_epoch(home)["valid"]["full"]
    assert "acc_nearest" in valid and "acc7" not in valid
    # On a corpus of CMU's scale the same model predicts there.
    decode(home, tmp_path / "cmu/valid", "full", "missing")
    other = read_predictions(home / "out/full/predictions.tsv").predictions
    assert stars.from_network(other) == pytest.approx(found["nearest"], abs=1e-4)


def test_starting_from_a_model(tmp_path):
    """Weights of a training on another corpus; a feature of another dimension starts anew and is named."""
    first, second = tmp_path / "first", tmp_path / "second"
    for home, names in ((first, ("audio", "text", "video")), (second, ("audio", "text"))):
        for number, name in enumerate(("train", "valid")):
            make_dump(home / name, 16, number + 5 * len(names), names)
    train(first)
    log, config = train(second, "--init", str(first / "exp"), "--lr", "0")
    assert config["init"] == str(first / "exp") and "not used here: " in log and "frame_projection.video" in log
    record = yaml.safe_load((second / "exp/init.yaml").read_text())
    assert record["from"] == str(first / "exp") and not record["anew"]
    theirs, ours = load_model(first / "exp").state_dict(), load_model(second / "exp").state_dict()
    assert all(torch.equal(theirs[name], x) for name, x in ours.items())  # without steps nothing has changed

    for number, name in enumerate(("train", "valid")):
        make_dump(tmp_path / "third" / name, 16, number, ("text", "video"))
        for table in (tmp_path / "third" / name).glob("text*"):  # a wider feature
            table.rename(table.with_name(table.name.replace("text", "audio")))
    (tmp_path / "third/exp").mkdir()
    tar = tmp_path / "model.tar"
    with tarfile.open(tar, "w") as archive:
        archive.add(first / "exp/model.valid-best.safetensors", "m/model.safetensors")
    log, _ = train(tmp_path / "third", "--init", str(tar), "--init-lr-factor", "0")
    assert "starting anew: frame_projection.audio" in log
    ours = load_model(tmp_path / "third/exp").state_dict()
    assert torch.equal(theirs["output.weight"], ours["output.weight"])


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("nowhere", "no such exp folder, packed model or checkpoint"),
        (
            "owner/nowhere",
            "owner/nowhere: no such experiment folder, packed folder or archive here. If it is a name on the",
        ),
        ("train/utt2label", "not an exp folder, packed model or released checkpoint"),
        ("wide", "train with the settings of that model"),
    ],
)
def test_what_cannot_be_started_from(tmp_path, init, message):
    for number, name in enumerate(("train", "valid")):
        make_dump(tmp_path / name, 8, number, ("audio", "text"))
    places = ["--train-dir", tmp_path / "train", "--valid-dir", tmp_path / "valid"]
    if init == "wide":
        done = call_here("train", *places, "--exp-dir", tmp_path / "wide", *SMALL, "--epochs", 1, "--dim", 24)
        assert done.returncode == 0, done.stderr
    source = init if init.startswith("owner") else tmp_path / init
    done = call_here("train", *places, "--exp-dir", tmp_path / "exp", *SMALL, "--init", source)
    assert done.returncode == 1 and message in done.stderr


def test_a_model_is_not_asked_about_features_of_another_width(tmp_path):
    for number, name in enumerate(("train", "valid")):
        make_dump(tmp_path / name, 8, number, ("audio",))
    train(tmp_path, epochs=1)
    make_dump(tmp_path / "other", 8, 2, ("video",))
    for table in (tmp_path / "other").glob("video*"):
        table.rename(table.with_name(table.name.replace("video", "audio")))
    done, _ = decode(tmp_path, tmp_path / "other", "audio")
    assert done.returncode == 1 and "other/audio.scp: dimension" in done.stderr and "Traceback" not in done.stderr
    twice = ["--train-dir", tmp_path / "train", tmp_path / "valid" / ".." / "train"]
    done = call_here("train", *twice, "--valid-dir", tmp_path / "valid", "--exp-dir", tmp_path / "two", *SMALL)
    assert done.returncode == 1 and "train is there twice" in done.stderr
