"""The comparison of experiments, and the one writer of Markdown tables."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from sdumc.bin.compare import main
from sdumc.errors import UserError
from sdumc.files import read_json, write_json
from sdumc.reporting.report import markdown_table
from sdumc.scoring.metrics import read_predictions, score


def test_markdown_table():
    assert markdown_table(("a", "b"), [("x|y", 1)]) == "| a | b |\n|---|---:|\n| x\\|y | 1 |"
    assert markdown_table(("", "b", "c"), [("x", "1\n2", "3")], left=2) == (
        "|  | b | c |\n|---|---|---:|\n| x | 1 2 | 3 |"
    )
    padded = markdown_table(("name", "n"), [("x", "1000"), ("long name", 2)], padded=True)
    assert padded.splitlines() == [
        "| name      |    n |",
        "|-----------|-----:|",
        "| x         | 1000 |",
        "| long name |    2 |",
    ]


def write_run(folder: Path, p: np.ndarray, y: np.ndarray) -> None:
    folder.mkdir(parents=True)
    rows = [f"s{i // 5:02d}-{i:03d}\t{a}\t{b}\n" for i, (a, b) in enumerate(zip(p.tolist(), y.tolist(), strict=True))]
    (folder / "predictions.tsv").write_text("utt_id\tprediction\tlabel\n" + "".join(rows))
    write_json(folder / "score.json", score(p, y))


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """Predictions of 60 utterances by 12 speakers: ``worse`` is worse by a tenth, ``same`` differs in single errors."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    y = rng.uniform(-3, 3, 60)
    for seed in (1, 2):
        error = rng.normal(0, 0.8, 60)
        for condition, factor in (("full", 1.0), ("none", 2.0)):
            write_run(Path(f"exp/train_seed{seed}/decode_test/{condition}"), y + factor * error, y)
            write_run(Path(f"exp/worse_seed{seed}/decode_test/{condition}"), y + factor * 1.1 * error, y)
            if seed == 1:
                noise = rng.choice([-1, 1], 60)
                write_run(Path(f"exp/same_seed{seed}/decode_test/{condition}"), y + factor * error * noise, y)
    Path("data/test").mkdir(parents=True)
    Path("data/test/utt2spk").write_text("".join(f"s{i // 5:02d}-{i:03d} s{i // 5:02d}\n" for i in range(60)))


ARGS = ["--experiments", "exp/train", "exp/worse", "exp/same", "--conditions", "full", "none"]


def test_compare(scored, capsys):
    main([*ARGS, "--output", "A.md"])
    text = Path("A.md").read_text()
    assert capsys.readouterr().out == text
    cells = {row.split(" | ")[0].strip("| "): row.strip(" |").split(" | ")[1:] for row in text.splitlines()}
    assert cells["experiment"] == ["full", "none", "seeds"]
    mae = {
        e: np.mean([read_json(f"exp/{e}_seed{s}/decode_test/full/score.json", "")["mae"] for s in (1, 2)])
        for e in ("train", "worse")
    }
    number = r"([+-]?\d\.\d{3})"
    value, low, high = map(float, re.fullmatch(rf"{number} \[{number}, {number}\]", cells["train"][0]).groups())
    assert low < value < high and value == pytest.approx(mae["train"], abs=6e-4)
    match = re.fullmatch(rf"{number} \[.*\] \({number} \[{number}, {number}\], worse\)", cells["worse"][0])
    value, difference, low, high = map(float, match.groups())
    assert value == pytest.approx(mae["worse"], abs=6e-4) and 0 < low < difference < high
    assert difference == pytest.approx(0.1 * mae["train"], abs=1e-3)
    assert re.search(
        r"\([+-]0\.000 \[[+-]0\.000, [+-]0\.000\]\)$", cells["same"][0]
    )  # no difference, and none is claimed
    assert (
        cells["same"][2] == "1" and "same: its seeds are not those of train; the difference is over seed 1 only" in text
    )
    assert "MAE on test (lower is better)" in text and "difference from `train`" in text
    assert "bootstrap over 12 speakers" in text


def test_higher_is_better_for_other_measures(scored, capsys):
    main(["--experiments", "exp/worse", "exp/train", "--conditions", "full", "--measure", "corr"])
    assert ", better)" in capsys.readouterr().out


def test_compare_without_speakers_or_common_seeds(scored, capsys):
    shutil.rmtree("data")
    Path("exp/same_seed1").rename("exp/same_seed7")
    main(ARGS)
    out = capsys.readouterr().out
    assert "There is no data/test/utt2spk: utterances were resampled" in out and "over 60 utterances" in out
    assert "same: its seeds are not those of train; the difference is not given: no seed is in both" in out


def test_compare_refuses_what_it_cannot_compare(scored, capsys):
    for wrong, message in (
        (["--test-set", "dev"], "decode_dev/full/predictions.tsv: not there; run stage 5 with --conditions full"),
        (["--experiments", "exp/other"], r"exp/other_seed\*: no such experiment"),
    ):
        with pytest.raises(UserError, match=message):
            main([*ARGS, *wrong])
    with pytest.raises(SystemExit):
        main([*ARGS, "--conditions", "fulll"])
    error = capsys.readouterr().err
    assert "fulll" in error and "audio+text" in error

    path = Path("exp/worse_seed2/decode_test/full")
    lines = (path / "predictions.tsv").read_text().splitlines(keepends=True)
    (path / "predictions.tsv").write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="not the score of"):
        main(ARGS)
    table = read_predictions(path / "predictions.tsv")
    write_json(path / "score.json", score(table.predictions, table.labels))
    with pytest.raises(UserError, match=r"worse_seed2.*train_seed1.*not about the same utterances and labels"):
        main(ARGS)
    shutil.rmtree(path)
    write_run(path, np.zeros(60), np.arange(60) / 20)
    with pytest.raises(UserError, match=r"score.json: corr is undefined there"):
        main([*ARGS, "--measure", "corr"])
