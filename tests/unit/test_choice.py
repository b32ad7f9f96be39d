"""What the choice of the epoch says about a run."""

import numpy as np
import pytest

from sdumc.scoring.metrics import doubts, median_mae


def test_median_mae():
    assert median_mae([-1.0, 0.5, 3.0], [0.5, 1.5, -0.5]) == pytest.approx(2 / 3)
    rng = np.random.default_rng(0)
    train, valid = {str(i): v for i, v in enumerate(rng.normal(size=9))}, rng.normal(size=4)
    assert median_mae(train.values(), valid) == pytest.approx(np.mean(np.abs(valid - sorted(train.values())[4])))


def test_doubts():
    assert doubts(3, 5, 0.8, 0.9) == doubts(3, 5, 0.8, None) == []
    (last,) = doubts(5, 5, 0.8, 0.9)
    assert last == "the best epoch is the last one (5): still improving; train longer"
    (useless,) = doubts(3, 5, 0.9, 0.9)
    assert "at best 0.9000) beat predicting the median of the train labels (0.9000)" in useless
    assert len(doubts(1, 1, float("inf"), 0.9)) == 2
