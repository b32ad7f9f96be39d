"""Settings files: bases, unknown and doubled keys; every shipped training file; what reaches the screen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdumc.bin.train import main as train
from sdumc.training.settings import get_parser

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(
    p for p in ROOT.glob("egs/*/conf/**/*.yaml") if p.name.startswith("train") or p.parent.name == "ablation"
)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_file_on_top_of_its_base_on_top_of_the_defaults(tmp_path):
    write(tmp_path / "base.yaml", "lr: 0.5\nepochs: 3\n")
    top = write(tmp_path / "top.yaml", "base: base.yaml\nlr: 0.25\n")
    args = get_parser().parse_args(["--config", top])
    assert (args.lr, args.epochs, args.batch_size) == (0.25, 3, 96)
    assert get_parser().parse_args(["--config", top, "--lr", "1"]).lr == 1


def test_underscores_in_keys(tmp_path):
    assert get_parser().parse_args(["--config", write(tmp_path / "c.yaml", "batch_size: 7\n")]).batch_size == 7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning-rate: 1\n", "unknown key 'learning-rate'"),
        ("lr: 1\nlr: 2\n", "given twice"),
        ("- lr\n", "expected `key: value` lines"),
        ("base: c.yaml\n", "leads back to itself"),
        ("base: none.yaml\n", "cannot be read"),
        ("epochs: [\n", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, capsys, text, said):
    path = write(tmp_path / "c.yaml", text)
    with pytest.raises(SystemExit) as stopped:
        get_parser().parse_args(["--config", path])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("value", ["--epochs=0", "--dropout=1", "--lr=x", "--mask-padding=maybe", "--fusion=sum"])
def test_wrong_values_are_refused(value):
    with pytest.raises(SystemExit):
        get_parser().parse_args([value])


def test_there_are_shipped_settings():
    assert ROOT / "egs/mini/conf/train.yaml" in SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_training_file_builds_and_steps(path, capsys):
    assert train(["--config", str(path), "--dry-run"]) == 0
    assert "settings are sound" in capsys.readouterr().out


LIBRARY = """
import logging, sys, warnings
from sdumc.cli import run, setup_logging

def main(argv):
    setup_logging("verbose" in sys.argv)
    from transformers.utils import logging as hf
    for name in ("matplotlib.font_manager", "libav"):
        logging.getLogger(name).warning("chatter of %s", name)
        logging.getLogger(name).error("error of %s", name)
    hf.get_logger("transformers.x").warning("chatter of transformers")
    hf.get_logger("transformers.x").error("error of transformers")
    warnings.warn("will be removed", FutureWarning)
    logging.getLogger("sdumc").warning("ours")

run(main)
"""


@pytest.mark.parametrize(("words", "chatter"), [((), False), (("verbose",), True)])
def test_only_errors_of_libraries_reach_the_screen(words, chatter):
    # Where CI is set, transformers 4 hands its messages to the root logger too, and each is shown twice.
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONWARNINGS", "TRANSFORMERS_VERBOSITY", "CI")}
    code = [sys.executable, "-c", LIBRARY, *words]
    err = subprocess.run(code, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stderr
    assert err.count("error of") == 3 and "WARNING ours" in err  # errors are never hidden
    assert err.count("chatter of") == (3 if chatter else 0)
    assert "will be removed" not in err


def test_deprecations_are_shown_on_request():
    code = [sys.executable, "-W", "default", "-c", LIBRARY]
    assert "will be removed" in subprocess.run(code, cwd=ROOT, capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize("recipe", ["TEMPLATE", "mini", "mosi", "sims"])
def test_the_paper_s_parts_are_off_in_small_corpora_and_on_beside_it(recipe):
    """docs/small_corpora.md says why they are off; who wants the paper's network finds it whole."""
    own, paper = (
        vars(get_parser().parse_args(["--config", str(ROOT / "egs" / recipe / "conf" / name)]))
        for name in ("train.yaml", "train_paper.yaml")
    )
    assert (own["fusion"], own["similarity"]) == ("concat", 0)
    whole = {"flows": "both", "imagination": "both", "fusion": "umca", "pooling": "attention"}
    weights = {"distil_query": 0.1, "distil_content": 0.7, "similarity": 0.13, "contrast": 0.5}
    assert paper | whole | weights == paper
    schedule = ("batch_size", "epochs", "min_epoch_steps", "lr", "dropout", "attention_dropout", "average_best")
    assert [own[key] for key in schedule] == [paper[key] for key in schedule]
