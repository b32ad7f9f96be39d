"""The benchmark of busy neighbours: both sides run, a missed goal is told, nothing is left running."""

from __future__ import annotations

import subprocess

import pytest

from sdumc.bench import neighbours


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
