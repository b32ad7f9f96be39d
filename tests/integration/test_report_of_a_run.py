"""A run that was killed once, decoded and reported on: TensorBoard's curves, and the report's parts together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import call_here
from helpers.dumps import make_dump
from helpers.stopping import at_step

from sdumc.bin import decode, report, score
from sdumc.scoring.attention import read_attention

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SMALL = ["--dim", "16", "--content-dim", "8", "--batch-size", "8", "--epochs", "12", "--save-every", "2"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipe")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for seed, (name, size) in enumerate((("train", 41), ("valid", 12), ("test", 40))):
            make_dump(root / "dump" / name, size, seed, absent={"video": {3}})
        exp = Path("exp/train_seed1")
        command = [sys.executable, "-m", "sdumc.bin.train", "--train-dir", "dump/train", "--valid-dir", "dump/valid"]
        command += ["--exp-dir", str(exp), *SMALL]
        # Six steps an epoch: killed in the fourth.
        first = subprocess.run(command, env=at_step(ENV, 21, signal.SIGKILL), capture_output=True)
        assert first.returncode == -signal.SIGKILL
        # What a kill between an epoch's events and its checkpoint leaves behind: the epoch is done, and noted, twice.
        board = sorted((exp / "tensorboard").iterdir())[0]
        _add_scalar(board, "train/loss", 1e6, step=11)
        again = call_here("train", *command[3:])
        assert again.returncode == 0, again.stderr
        given = ["--exp-dir", str(exp), "--data-dir", "dump/test", "--output-dir", str(exp / "decode_test")]
        decode.main([*given, "--condition", "full", "missing", "asr", "none", "--device", "cpu"])
        for path in (exp / "decode_test").glob("*/predictions.tsv"):
            score.main(["--predictions", str(path), "--output", str(path.with_name("score.json"))])
        report.main(["--exp-dirs", str(exp), "--output-dir", "exp/train", "--results", "RESULTS.md"])
    return root


def _add_scalar(path: Path, tag: str, value: float, step: int) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    with open(path, "ab") as f:
        entry = Summary.Value(tag=tag, simple_value=value)
        RecordWriter(f).write(Event(wall_time=1, step=step, summary=Summary(value=[entry])).SerializeToString())


def test_tensorboard_has_the_curves_of_metrics(recipe):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    exp = recipe / "exp/train_seed1"
    history = [json.loads(line) for line in (exp / "metrics.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in history] == list(range(1, 13))
    assert len(list((exp / "tensorboard").iterdir())) == 2  # a file for each start
    for folder in (exp, recipe / "exp/train"):  # the run's own, and the mean over one run
        board = EventAccumulator(str(folder / "tensorboard")).Reload()
        for tag in ("train/loss", "train/contrast", "valid/full/mae", "valid/missing/mae", "lr"):
            values = history
            for key in tag.split("/"):
                values = [entry[key] for entry in values]
            assert [e.step for e in board.Scalars(tag)] == list(range(1, 13)), f"{folder} {tag}"
            assert [e.value for e in board.Scalars(tag)] == pytest.approx(values, rel=1e-6), f"{folder} {tag}"
        if folder != exp:
            assert {f"figures/{p.stem}" for p in (folder / "images").iterdir()} == set(board.Tags()["images"])


def test_report_shows_what_decoding_kept(recipe):
    page = (recipe / "exp/train/report.html").read_text()
    kept = read_attention(recipe / "exp/train_seed1/decode_test/missing")
    assert 24 <= len(kept) <= 30
    # Nine cards, nine and six, each with a map per modality; the utterance without video has two.
    assert 3 * 24 - 3 <= page.count('<div class="heat">') <= 3 * 24
    assert "over simulated text of" in page and "over real text of" in page
    assert (recipe / "exp/train/images/test_attention_over_frames.png").stat().st_size > 10_000
