"""Scales of labels: what is declared, what is measured on them, and the way to the network's scale and back."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.commands import call_here

from sdumc.data.kaldi_dir import load_kaldi_dir, validate_kaldi_dir
from sdumc.data.tables import write_table
from sdumc.errors import UserError
from sdumc.files import read_json
from sdumc.scale import CMU, SIMS, LabelScale, declared_scale, looks_like_classes, parse_scale, scale_of
from sdumc.scoring.metrics import Bootstrap, score, score_with_intervals


def sims_toolkit(p: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """The common toolkit's classes of CH-SIMS, written out: intervals open below and closed above."""
    p, y = np.clip(p, -1, 1), np.clip(y, -1, 1)

    def classes(v, edges):
        found = np.full(len(v), -1)
        for i in range(len(edges) - 1):
            found[(v > edges[i]) & (v <= edges[i + 1])] = i
        return found

    result = {}
    edges = {"acc2": [-1.01, 0, 1.01], "acc3": [-1.01, -0.1, 0.1, 1.01], "acc5": [-1.01, -0.7, -0.1, 0.1, 0.7, 1.01]}
    for name, e in edges.items():
        result[name] = float(np.mean(classes(p, e) == classes(y, e)))
    truth, said = classes(y, edges["acc2"]), classes(p, edges["acc2"])
    f1 = 0.0
    for c in (0, 1):
        hits = np.sum((truth == c) & (said == c))
        f1 += np.mean(truth == c) * 2 * hits / max(1, np.sum(truth == c) + np.sum(said == c))
    return {**result, "f1": float(f1)}


def test_classes_of_sims_are_the_toolkits():
    rng = np.random.default_rng(3)
    y = rng.choice(np.round(np.arange(-1, 1.01, 0.2), 1), 300)
    p = np.concatenate([np.round(y[:150] + rng.normal(0, 0.4, 150), 1), y[150:] + rng.normal(0, 0.4, 150)])
    got = score(p, y, scale=SIMS)
    assert {m: got[m] for m in ("acc2", "acc3", "acc5", "f1")} == pytest.approx(sims_toolkit(p, y))
    assert got["mae"] == pytest.approx(np.mean(np.abs(p - y))) and got["scale"]["classes"] == "sims"
    assert "acc7" not in got


@pytest.mark.parametrize("scale", [CMU, SIMS, LabelScale(1, 5, "nearest"), LabelScale(1, 5, "none")])
def test_resampled_measures_are_those_of_the_drawn_utterances(scale):
    rng = np.random.default_rng(0)
    y = rng.choice(scale.ticks(), 24)
    p = (y + rng.normal(0, 0.3 * (scale.high - scale.low), 24))[None]
    bootstrap = Bootstrap(y, list("aaabbbcccddd" * 2), scale=scale, resamples=30)
    got = bootstrap.by_run(p)
    assert list(got) == list(scale.measures)
    for b, weights in enumerate(bootstrap.weights):
        drawn = np.repeat(np.arange(24), weights[bootstrap.index])
        reference = score(p[0, drawn], y[drawn], scale=scale)
        for m in scale.measures:
            assert got[m][b, 0] == pytest.approx(reference[m], abs=1e-9, nan_ok=True), m


def test_nearest_class_of_words():
    scale = parse_scale("-1 1", {"negative": -1, "neutral": 0, "positive": 1})
    assert scale.scheme == "nearest" and list(scale.measures)[3:] == ["acc_nearest", "f1_nearest"]
    got = score([-2.0, 0.4, 0.6, 0.1], [-1.0, 0.0, 0.0, 1.0], scale=scale)
    assert got["acc_nearest"] == 0.5
    assert scale.named_ends == "-1 (negative) to 1 (positive)"
    assert score_with_intervals(np.array([1.0, 2.0]), np.array([1.0, 5.0]), None, scale=parse_scale("1 5"))["n"] == 2


@pytest.mark.parametrize("scale", [CMU, SIMS, LabelScale(1, 5, "none"), LabelScale(0, 100, "none")])
def test_the_networks_scale_is_cmus(scale):
    labels = np.linspace(scale.low, scale.high, 7)
    there = scale.to_network(labels)
    assert there == pytest.approx(np.linspace(-3, 3, 7)) and scale.from_network(there) == pytest.approx(labels)
    if scale is CMU:
        assert scale.to_network(labels) is labels and scale.from_network(labels) is labels
    assert 4 <= len(scale.ticks()) <= 9 and scale.low <= scale.ticks()[0] and scale.ticks()[-1] <= scale.high


def test_a_scale_on_disk(tmp_path):
    assert declared_scale(tmp_path) is None and scale_of(tmp_path) is CMU
    scale = parse_scale("1 5", {"schlecht": 1, "gut": 5})
    scale.write(tmp_path)
    assert scale_of(tmp_path) == scale
    (tmp_path / "scale.yaml").write_text("low: 1\nhight: 5\n")
    with pytest.raises(UserError, match=r"scale.yaml: unknown key 'hight'"):
        scale_of(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5 1", "the lowest must be below the highest"),
        ("stars", "is no scale of labels"),
        ("1 5 cmu", "the classes of cmu are of labels from -3 to 3, not 1 to 5"),
        ("1 5 seven", "'seven' is no scheme"),
        ("0 1000 nearest", "give words, or whole numbers"),
    ],
)
def test_what_is_no_scale(text, message):
    with pytest.raises(UserError, match=message):
        parse_scale(text)


def data_dir(path, labels):
    utts = {f"s{i:02d}-1": label for i, label in enumerate(labels)}
    write_table(path / "wav.scp", dict.fromkeys(utts, "/nowhere.wav"))
    write_table(path / "utt2spk", {utt: utt[:3] for utt in utts})
    write_table(path / "utt2label", utts)
    return path


def test_a_data_directory_is_checked_against_its_own_scale(tmp_path):
    path = data_dir(tmp_path, [1, 4.5, 5])
    (problem, _) = validate_kaldi_dir(path, check_media=False)
    assert "label 4.5 is outside [-3, 3]" in str(problem)
    parse_scale("1 5").write(path)
    assert validate_kaldi_dir(path, check_media=False) == [] and load_kaldi_dir(path).utt2label["s01-1"] == 4.5
    data_dir(tmp_path, [1, 4.5, 6])
    with pytest.raises(UserError, match=r"utt2label:3: utterance 's02-1': label 6 is outside \[1, 5\]"):
        load_kaldi_dir(path)


def test_class_numbers_are_asked_about(tmp_path):
    path = data_dir(tmp_path, [0, 1, 2] * 8)
    (problem,) = validate_kaldi_dir(path, check_media=False)
    assert "only 0, 1, 2, which look like numbers of classes" in str(problem) and "--label-scale" in str(problem)
    parse_scale("0 2 nearest").write(path)
    assert validate_kaldi_dir(path, check_media=False) == []
    assert looks_like_classes([-1.0, 0.0, 1.0] * 9) is None and looks_like_classes([0, 1] * 3) is None
    assert looks_like_classes([0, 1.5, 2] * 9) is None


def test_score_takes_the_scale_from_beside_the_predictions(tmp_path):
    (tmp_path / "predictions.tsv").write_text("utt_id\tprediction\tlabel\na\t4.4\t4\nb\t2\t1\n")
    parse_scale("1 5 nearest").write(tmp_path)
    arguments = ["--predictions", str(tmp_path / "predictions.tsv"), "--output", str(tmp_path / "score.json")]
    done = call_here("score", *arguments)
    content = read_json(tmp_path / "score.json", "")
    assert content["acc_nearest"] == 0.5 and content["scale"] == {"low": 1, "high": 5, "classes": "nearest"}
    assert "labels from 1 to 5" in done.stdout
    call_here("score", *arguments, "--label-scale", "0 10 none")
    assert "acc_nearest" not in read_json(tmp_path / "score.json", "")
