"""Measures against scipy, scikit-learn and cases worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdumc.scoring.metrics import classes as whole_classes
from sdumc.scoring.metrics import concordance, format_measure, pearson, score, weighted_f1


def accuracy(p, y, rounding):
    return np.mean(whole_classes(p, 3, rounding) == whole_classes(y, 3, rounding))


def test_against_scipy_and_sklearn():
    from scipy.stats import pearsonr
    from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error

    rng = np.random.default_rng(0)
    for n in (2, 7, 500):
        y = np.round(rng.uniform(-3, 3, n) * 3) / 3  # labels in thirds, as averages of three annotators are
        p = y + rng.normal(0, 1.5, n)
        got = score(p, y)
        assert got["n"] == n
        assert got["mae"] == pytest.approx(mean_absolute_error(y, p))
        assert got["corr"] == pytest.approx(pearsonr(p, y).statistic)
        for limit, key in ((3, "acc7"), (2, "acc5"), (1, "acc3")):
            classes = [np.round(np.clip(v, -limit, limit)) for v in (y, p)]
            assert got[key] == pytest.approx(accuracy_score(*classes))
        assert got["acc2_has0"] == pytest.approx(accuracy_score(y >= 0, p >= 0))
        assert got["f1_has0"] == pytest.approx(f1_score(y >= 0, p >= 0, average="weighted"))
        keep = y != 0
        assert got["acc2_non0"] == pytest.approx(accuracy_score(y[keep] > 0, p[keep] > 0))
        assert got["f1_non0"] == pytest.approx(f1_score(y[keep] > 0, p[keep] > 0, average="weighted"))
        assert got["n_non0"] == keep.sum()
        assert got["notes"] == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_weighted_f1_is_sklearns(pairs):
    from sklearn.metrics import f1_score

    truth, predicted = (np.array(v) for v in zip(*pairs, strict=True))
    assert weighted_f1(truth, predicted) == pytest.approx(
        f1_score(truth, predicted, average="weighted", zero_division=0.0)
    )


def test_weighted_f1_takes_the_truth_first():
    truth, predicted = np.array([1, 1, 1, 0], bool), np.array([1, 0, 0, 0], bool)
    # positive: 2*1/(3+1) = .5 with weight 3; negative: 2*1/(1+3) = .5 with weight 1
    assert weighted_f1(truth, predicted) == 0.5
    truth, predicted = np.array([1, 1, 1, 0], bool), np.array([1, 1, 1, 1], bool)
    assert weighted_f1(truth, predicted) == pytest.approx(3 / 4 * 6 / 7)
    assert weighted_f1(predicted, truth) == pytest.approx(6 / 7)


def test_ties_at_a_half():
    y = np.array([0.0, 2.0, 2.0, -2.0, 0.0])
    p = np.array([0.5, 1.5, 2.5, -2.5, -0.5])
    assert accuracy(p, y, "half-even") == 1.0  # .5 -> 0, 1.5 -> 2, 2.5 -> 2: to the even neighbour
    assert accuracy(p, y, "away") == 0.2  # 1, 2, 3, -3, -1


def test_away_is_the_cmu_sdk_rule():
    values = np.array([-3.0, -2.01, -2.0, -1.2, -1.0, -0.01, 0.0, 0.01, 1.0, 1.01, 2.0, 2.5, 3.0])
    classes = np.array([-3, -3, -2, -2, -1, -1, 0, 1, 1, 2, 2, 3, 3.0])
    assert accuracy(values, classes, "away") == 1.0
    assert accuracy(values + np.where(values > 2, 10, 0), classes, "away") == 1.0  # clipped


def test_clipping_happens_before_rounding_and_only_for_classes():
    got = score([4.4, -9.0], [3.0, -3.0])
    assert got["acc7"] == got["acc5"] == got["acc3"] == 1.0
    assert got["mae"] == pytest.approx((1.4 + 6.0) / 2)


def test_zeros_count_as_positive_only_with_zeros():
    got = score([0.0, -0.1, 0.1, -0.0], [0.0, 0.0, -1.0, 1.0])
    assert got["acc2_has0"] == 0.5  # (0 >= 0 twice right: the first and the last)
    assert got["acc2_non0"] == 0.0  # the last: p = 0 is not > 0
    assert got["n_non0"] == 2


@pytest.mark.parametrize(
    "p, y, reason",
    [
        ([0.1] * 7, [1, 2, 3, 0, -1, -2, -3], "all predictions"),
        ([1, 2, 3], [0.3] * 3, "all labels"),
        ([1], [1], "one utterance"),
    ],
)
def test_undefined_correlation_says_why(p, y, reason):
    got = score(p, y)
    assert math.isnan(got["corr"])
    (note,) = [n for n in got["notes"] if n.startswith("corr")]
    assert reason in note


def test_concordance_by_hand_and_by_pearson():
    # Means 2 and 3, variances (1 / N) 2/3 and 2/3, covariance 2/3: 2 * 2/3 / (4/3 + 1) = 4/7.
    assert concordance(np.array([1.0, 2, 3]), np.array([2.0, 3, 4])) == (pytest.approx(4 / 7), "")
    rng = np.random.default_rng(1)
    y = rng.normal(size=50)
    p = 0.5 * y + rng.normal(size=50)
    # Lin: CCC = Corr * 2 / (v + 1 / v + u^2), v = sd(p) / sd(y), u = (mean(p) - mean(y)) / sqrt(sd(p) sd(y))
    v, u = p.std() / y.std(), (p.mean() - y.mean()) / math.sqrt(p.std() * y.std())
    assert score(p, y)["ccc"] == pytest.approx(score(p, y)["corr"] * 2 / (v + 1 / v + u**2))
    assert score(y, y)["ccc"] == pytest.approx(1) and score(-y, y)["ccc"] < score(p, y)["ccc"] < score(p, y)["corr"]
    assert score([0.5] * 3, [1, 2, 3])["ccc"] == 0  # no spread, no agreement
    for same in ([1.0], [2.0, 2.0]):
        got = score(same, same)
        assert math.isnan(got["ccc"]) and any(n.startswith("ccc is undefined: ") for n in got["notes"])


def test_format():
    assert format_measure("mae", 0.5786, interval=(0.5312, 0.6345)) == "0.579 [0.53, 0.63]"
    assert format_measure("acc7", 0.8123, interval=(0.789, 0.8349)) == "81.2 [79, 83]"
    assert format_measure("ccc", 0.5, interval=(math.nan, math.nan)) == "0.500"
    assert format_measure("corr", math.nan, interval=(0.0, 1.0)) == "–"


def test_all_labels_zero():
    got = score([1.0, -1.0], [0.0, 0.0])
    assert math.isnan(got["acc2_non0"]) and math.isnan(got["f1_non0"])
    assert any("every label is zero" in note for note in got["notes"])


def test_tiny_spread_still_has_a_correlation():
    p = 1.0 + np.array([0.0, 1.0, 2.0]) * 1e-15
    r, why = pearson(p, np.array([0.0, 1.0, 2.0]))
    assert why == "" and r > 0.9
    r, why = pearson(np.array([0.0, 1e-200, 2e-200]), np.array([0.0, 1.0, 2.0]))
    assert r == pytest.approx(1.0)


@pytest.mark.parametrize("p, y", [([], []), ([1.0], [1.0, 2.0]), ([math.nan], [1.0]), ([1.0], [math.inf])])
def test_what_cannot_be_scored_is_refused(p, y):
    with pytest.raises(ValueError):
        score(p, y)


def test_unknown_rounding():
    with pytest.raises(ValueError, match="half-even"):
        score([1.0], [1.0], rounding="up")
