"""The benchmarks of busy neighbours (both sides run, a missed goal is told, nothing is left running) and of predict."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sdumc.bench import neighbours, predict
from sdumc.errors import UserError


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(neighbours, "ALONE", 0.01)
    monkeypatch.setattr(neighbours, "BESIDE", 0.01)
    monkeypatch.setattr(neighbours, "IDLE_ROUNDS", 1)
    monkeypatch.setattr(neighbours, "WORKS", [neighbours.Work("a step in two ranks", "sentences", 2, 1)])


@pytest.mark.slow
def test_both_sides_run_and_end(quick, monkeypatch, capsys):
    started = []
    popen = subprocess.Popen

    def start(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    neighbours.main(1)
    out = capsys.readouterr().out
    assert out.count("| a step in two ranks |") == 2  # a row for each side
    assert out.count("Goal: a step in two ranks") == 3
    assert len(started) == 2 * 2 + 1 + 2  # ranks of both sides, one neighbour, two neighbours
    assert all(process.poll() is not None for process in started)


def test_a_missed_goal_is_told(monkeypatch, capsys):
    def times(work, repeats):
        return {(side, n): [1.0 + 2 * n if side == "ours" else 1.0] for side in neighbours.SIDES for n in (0, 1, 2)}

    monkeypatch.setattr(neighbours, "measure", times)
    assert not neighbours.main(1)
    out = capsys.readouterr().out
    assert "times as slow beside 1 at most 2.5; measured 3: MISSED" in out
    assert "alone, at most 1.03; measured 1: reached" in out


def test_predict_is_measured_with_copies_of_a_clip(tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "x.wav", np.full(16000, 0.1, np.float32), 16000)
    asked = []

    def cost(words):
        path = Path(words[-1])
        count = len(list(path.iterdir())) if path.is_dir() else 1
        asked.append((path.name, count, soundfile.info(path).duration if path.is_file() else 0.0))
        return predict.Cost(1.0, 2.0 + 0.1 * count, 300.0 + count)

    monkeypatch.setattr(predict, "cost", cost)
    assert not predict.main(2, "exp", str(tmp_path / "x.wav"), 150, 0.5)  # memory grew by more than a tenth
    assert asked == [*3 * [("x.wav", 1, 1.0)], ("50", 50, 0.0), ("150", 150, 0.0), ("long.wav", 1, pytest.approx(30.4))]
    out = capsys.readouterr().out
    assert "A further clip takes 100 ms of processor time." in out and "measured 1.29: MISSED" in out


def test_predict_needs_a_model_and_says_when_it_failed(tmp_path, capfd):
    assert predict.main(2, None, None, 5, 1) and "needs --exp-dir" in capfd.readouterr().out
    with pytest.raises(UserError, match="ended with 1; what is wrong stands above"):
        predict.cost(["--exp-dir", str(tmp_path / "none"), str(tmp_path / "x.wav")])
    assert "error:" in capfd.readouterr().err
