"""Intervals by bootstrap: against resamples scored one by one, coverage on simulated data, pairs, degenerate cases."""

import json
import math

import numpy as np
import pytest

from sdumc.bin.score import main
from sdumc.errors import UserError
from sdumc.scale import CMU
from sdumc.scoring.metrics import Bootstrap, clusters_of, expanded_tail, score, score_with_intervals


def simulated(rng, speakers=8, each=6, runs=3):
    """Labels in thirds, predictions (R, N) whose errors have a part that the speaker's utterances share."""
    names = [f"s{i:02d}" for i in range(speakers) for _ in range(each)]
    y = np.round(rng.uniform(-3, 3, len(names)) * 3) / 3
    shared = np.repeat(rng.normal(0, 0.5, speakers), each)
    return names, y, y + shared + rng.normal(0, 0.8, (runs, len(y)))


@pytest.mark.parametrize("rounding", ["half-even", "away"])
def test_resamples_are_those_of_scoring_one_by_one(rounding):
    rng = np.random.default_rng(0)
    names, y, p = simulated(rng)
    y[:6] = 0.0
    bootstrap = Bootstrap(y, names, rounding, resamples=40)
    got = bootstrap.by_run(p)
    members = [np.flatnonzero(np.array(names) == s) for s in sorted(set(names))]
    assert bootstrap.weights.sum(axis=1).tolist() == [8] * 40
    for b, weights in enumerate(bootstrap.weights):
        drawn = np.concatenate([np.tile(rows, w) for rows, w in zip(members, weights.tolist(), strict=True)])
        for r in range(len(p)):
            reference = score(p[r, drawn], y[drawn], rounding)
            for m in CMU.measures:
                assert got[m][b, r] == pytest.approx(reference[m], abs=1e-9), m


def test_the_sums_of_all_utterances_are_the_score():
    names, y, p = simulated(np.random.default_rng(3), runs=1)
    bootstrap = Bootstrap(y + 100, names, resamples=1)
    bootstrap.weights[:] = 1
    reference = score(p[0] + 100, y + 100)  # far from zero: the sums of squares must not lose their digits
    for m, values in bootstrap.by_run(p + 100).items():
        assert values[0, 0] == pytest.approx(reference[m], nan_ok=True), m


def test_limits_are_expanded_percentiles():
    assert expanded_tail(10**6) == pytest.approx(0.025, rel=1e-4)
    # t(0.025, 9) = -2.2622 from tables; times sqrt(10 / 9) it is -2.3846, below which a normal variable is in 0.85%.
    assert expanded_tail(10) == pytest.approx(0.00855, abs=2e-5)
    bootstrap = Bootstrap(np.zeros(10), None, resamples=1001)
    low, high = bootstrap.limits(np.arange(1001.0))
    assert (low, high) == pytest.approx((1000 * expanded_tail(10), 1000 - 1000 * expanded_tail(10)))


def test_intervals_cover_the_truth():
    """The true MAE of normal errors with a part that a speaker's utterances share: within 95% of the intervals."""
    rng = np.random.default_rng(5)
    truth = math.hypot(0.5, 0.8) * math.sqrt(2 / math.pi)
    inside = by_utterance = 0
    for _ in range(300):
        names, y, p = simulated(rng, speakers=15, each=8, runs=1)
        for clusters in (names, None):
            low, high = Bootstrap(y, clusters, resamples=400).intervals(p)["mae"]
            inside += clusters is not None and low <= truth <= high
            by_utterance += clusters is None and low <= truth <= high
    assert 0.915 <= inside / 300 <= 0.98
    assert by_utterance < inside  # utterances of a speaker are alike


def test_seeds_widen_the_interval_by_their_variance():
    """All utterances have the same error, which differs by seed: the interval is that of a mean over seeds."""
    rng = np.random.default_rng(2)
    variances = []
    for _ in range(200):
        p = np.abs(2 + rng.normal(0, 0.1, (4, 1)) + np.zeros((4, 20)))
        variances.append(Bootstrap(np.zeros(20), None, resamples=300).resample(p)["mae"].var())
    assert np.mean(variances) == pytest.approx(0.1**2 / 4, rel=0.15)  # unbiased: s^2 / R
    assert Bootstrap(np.zeros(20)).resample(p[:1])["mae"].std() == pytest.approx(0, abs=1e-12)


def test_a_difference_is_paired_by_utterance_and_seed():
    names, y, p = simulated(np.random.default_rng(1), speakers=12, runs=3)
    better = y + 0.9 * (p - y)
    bootstrap = Bootstrap(y, names)
    a, b = (bootstrap.resample(x)["mae"] for x in (better, p))
    low, high = bootstrap.limits(a - b)
    assert low < np.abs(better - y).mean() - np.abs(p - y).mean() < high < 0
    separate = [bootstrap.limits(v) for v in (a, b)]
    assert separate[0][1] > separate[1][0]  # the two intervals overlap: only the pairs show the difference
    assert high - low < 0.3 * (separate[0][1] - separate[0][0])
    assert np.array_equal(Bootstrap(y, names).resample(p)["corr"], bootstrap.resample(p)["corr"])  # seeded


def test_constant_predictions_and_single_class():
    names, y, _ = simulated(np.random.default_rng(4))
    got = score_with_intervals(np.full(len(y), 0.1), y, names)
    assert math.isnan(got["corr"]) and got["intervals"]["corr"] is None and got["interval_method"]["notes"] == []
    assert got["ccc"] == 0 and got["intervals"]["ccc"] == [0, 0]
    got = score_with_intervals(np.full(len(y), 0.1), np.abs(y) + 0.1, names)
    assert got["f1_has0"] == 1 and got["intervals"]["f1_has0"] == [1, 1]
    assert score_with_intervals(y * 0.1, y * 0, names)["intervals"]["acc2_non0"] is None


def test_resamples_that_leave_a_measure_undefined():
    rng = np.random.default_rng(6)
    names, y, p = simulated(rng, speakers=6, each=3, runs=1)
    p[0, 3:] = 0.25  # of five speakers: constant predictions unless the first one is drawn, in (5/6)^6 of resamples
    got = score_with_intervals(p[0], y, names)
    assert got["corr"] == pytest.approx(np.corrcoef(p[0], y)[0, 1]) and got["intervals"]["corr"] is None
    (note,) = got["interval_method"]["notes"]
    count = int(note.removeprefix("corr is undefined in ").split()[0])
    assert count / 2000 == pytest.approx((5 / 6) ** 6, abs=0.03)
    y[5:] = 0  # acc2_non0 needs a label that is not zero
    assert "acc2_non0 is undefined in" in " ".join(score_with_intervals(p[0], y, names)["interval_method"]["notes"])


def test_one_speaker_has_no_interval():
    got = score_with_intervals(np.array([0.1, 1.0, 2.0]), np.array([0.0, 1.0, 1.0]), ["a"] * 3)
    assert set(got["intervals"].values()) == {None}
    assert got["interval_method"]["notes"] == ["no intervals: 1 speaker only"]


def test_speakers_must_be_known_for_all_or_none():
    assert clusters_of(["a", "b"], {}, "utt2spk") is None
    assert clusters_of(["a", "b", "c"], {"a": "x", "b": "y", "c": "x"}, "utt2spk") == ["x", "y", "x"]
    assert clusters_of(["a", "b"], {"a": "x", "b": "y", "c": "y"}, "utt2spk") is None  # a speaker each: nobody is known
    with pytest.raises(UserError, match="utt2spk: 1 of the 2 scored utterances have no speaker, the first is b"):
        clusters_of(["a", "b"], {"a": "x"}, "utt2spk")


def test_score_command(tmp_path, capsys):
    names, y, p = simulated(np.random.default_rng(8), speakers=5, each=4, runs=1)
    ids = [f"{s}-{i:02d}" for i, s in enumerate(names)]
    rows = [f"{u}\t{a}\t{b}\n" for u, a, b in zip(ids, p[0].tolist(), y.tolist(), strict=True)]
    (tmp_path / "p.tsv").write_text("utt_id\tprediction\tlabel\n" + "".join(rows))
    (tmp_path / "utt2spk").write_text("".join(f"{u} {s}\n" for u, s in zip(ids, names, strict=True)))
    args = ["--predictions", str(tmp_path / "p.tsv"), "--output", str(tmp_path / "score.json")]
    main(args)
    plain = json.loads((tmp_path / "score.json").read_text())
    assert "bootstrap over 20 utterances; no speakers were given" in capsys.readouterr().out
    main([*args, "--utt2spk", str(tmp_path / "utt2spk")])
    got = json.loads((tmp_path / "score.json").read_text())
    assert list(got["intervals"]) == list(CMU.measures) and got["interval_method"]["clusters"] == 5
    assert got["interval_method"]["resampled"] == "speakers"
    assert got["mae"] == plain["mae"] and got["intervals"]["mae"] != plain["intervals"]["mae"]
    low, high = got["intervals"]["mae"]
    assert low < got["mae"] < high
    out = capsys.readouterr().out
    assert f"mae {got['mae']:.4f} [{low:.3f}, {high:.3f}]" in out and "bootstrap over 5 speakers\n" in out
