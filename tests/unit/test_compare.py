"""The comparison of experiments, and the one writer of Markdown tables."""

import json
from pathlib import Path

import pytest

from sdumc.bin.compare import main
from sdumc.errors import UserError
from sdumc.reporting.markdown import markdown_table


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


@pytest.fixture
def scored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, maes in {"train": (0.5, 0.7), "without_mia": (0.8,)}.items():
        for seed, mae in enumerate(maes, start=1):
            for condition in ("full", "none"):
                path = Path(f"exp/{name}_seed{seed}/decode_test/{condition}/score.json")
                path.parent.mkdir(parents=True)
                path.write_text(json.dumps({"mae": mae + (condition == "none"), "corr": None}))


ARGS = ["--experiments", "exp/train", "exp/without_mia", "--conditions", "full", "none"]


def test_compare(scored, capsys):
    main([*ARGS, "--output", "A.md"])
    text = Path("A.md").read_text()
    assert capsys.readouterr().out == text
    assert "| experiment | full | none | seeds |\n|---|---:|---:|---:|\n" in text
    assert "| train | 0.6000 ± 0.1414 | 1.6000 ± 0.1414 | 2 |\n" in text
    assert "| without mia | 0.8000 (+0.2000) | 1.8000 (+0.2000) | 1 |\n" in text
    assert "MAE on test (lower is better)" in text and "difference from `train`" in text


def test_compare_refuses_what_it_cannot_compare(scored, capsys):
    for wrong, message in (
        (["--measure", "corr"], "score.json: corr is undefined there"),
        (["--measure", "acc7"], "score.json: not a score file"),
        (["--test-set", "dev"], "decode_dev/full/score.json: not there; run stage 5 with --conditions full"),
        (["--experiments", "exp/other"], r"exp/other_seed\*: no such experiment"),
    ):
        with pytest.raises(UserError, match=message):
            main([*ARGS, *wrong])
    with pytest.raises(SystemExit):
        main([*ARGS, "--conditions", "fulll"])
    error = capsys.readouterr().err
    assert "fulll" in error and "audio+text" in error
