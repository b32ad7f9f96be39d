"""The score command: what it writes and what it refuses."""

import json
import subprocess
import sys

import pytest

from sdumc.bin.score import main
from sdumc.errors import UserError

KEYS = ["mae", "corr", "acc7", "acc5", "acc3", "acc2_has0", "f1_has0", "acc2_non0", "f1_non0", "n"]


def write(path, *rows, header="utt_id\tprediction\tlabel"):
    path.write_text("".join(f"{line}\n" for line in (header, *rows)))
    return str(path)


def test_writes_the_measures(tmp_path, capsys):
    predictions = write(tmp_path / "p.tsv", "a-1\t1.5\t1.0", "a-2\t-0.25\t-1.0", "b-1\t2.0\t3")
    main(["--predictions", predictions, "--output", str(tmp_path / "out/score.json")])
    got = json.loads((tmp_path / "out/score.json").read_text())
    assert list(got)[:10] == KEYS
    assert got["n"] == 3 and got["mae"] == pytest.approx((0.5 + 0.75 + 1) / 3)
    assert got["rounding"] == "half-even" and got["notes"] == []
    assert "mae 0.7500" in capsys.readouterr().out


def test_rounding_switch(tmp_path):
    predictions = write(tmp_path / "p.tsv", "a\t0.2\t0.0", "b\t0.9\t1.0")
    for rounding, acc7 in (("half-even", 1.0), ("away", 0.5)):
        main(["--predictions", predictions, "--output", str(tmp_path / "s.json"), "--rounding", rounding])
        got = json.loads((tmp_path / "s.json").read_text())
        assert got["acc7"] == acc7 and got["rounding"] == rounding


def test_undefined_is_null_with_a_note(tmp_path, capsys):
    predictions = write(tmp_path / "p.tsv", "a\t0.1\t0.0", "b\t0.1\t1.0")
    main(["--predictions", predictions, "--output", str(tmp_path / "s.json")])
    got = json.loads((tmp_path / "s.json").read_text())
    assert got["corr"] is None
    assert got["notes"] == ["corr is undefined: all predictions are the same"]
    assert "corr -" in capsys.readouterr().out


@pytest.mark.parametrize(
    "rows, line, words",
    [
        (["a\t1.0"], 2, "columns"),
        (["a\t1.0\t1.0\t1"], 2, "columns"),
        (["a 1.0 1.0"], 2, "columns"),
        (["a\t1.0\t1.0", ""], 3, "columns"),
        (["\t1.0\t1.0"], 2, "id is empty"),
        (["a\tnan\t1.0"], 2, "utterance a: the prediction is not finite"),
        (["a\tinf\t1.0"], 2, "not finite"),
        (["a\tone\t1.0"], 2, "the prediction is not a number"),
        (["a\t1.0\tx"], 2, "utterance a: the label is not a number"),
        (["a\t1.0\tinf"], 2, "the label is not finite"),
        (["a\t1\t1", "b\t1\t1", "a\t1\t1"], 4, "line 2 already"),
        (["b\t1\t1", "a\t1\t1"], 3, "sort the lines"),
        (["a\t1.0\t"], 2, "has no label"),
        (["a\t1\t1", "b\t1.0\tnan"], 3, "utterance b has no label"),
    ],
)
def test_bad_lines_are_named(tmp_path, rows, line, words):
    path = write(tmp_path / "p.tsv", *rows)
    output = tmp_path / "s.json"
    output.write_text("{}")
    with pytest.raises(UserError) as e:
        main(["--predictions", path, "--output", str(output)])
    assert str(e.value).startswith(f"{path}:{line}: ") and words in str(e.value)
    assert output.read_text() == "{}"


def test_bad_files(tmp_path):
    def refused(path):
        with pytest.raises(UserError) as e:
            main(["--predictions", str(path), "--output", str(tmp_path / "s.json")])
        return str(e.value)

    assert "cannot be read" in refused(tmp_path / "none.tsv")
    assert ":1: the header" in refused(write(tmp_path / "h.tsv", "a\t1\t1", header="id\tp\ty"))
    assert "no utterance" in refused(write(tmp_path / "e.tsv"))
    (tmp_path / "0.tsv").write_text("")
    assert ":1: the header" in refused(tmp_path / "0.tsv")
    (tmp_path / "latin.tsv").write_bytes(b"utt_id\tprediction\tlabel\n\xe9\t1\t1\n")
    assert "UTF-8" in refused(tmp_path / "latin.tsv")


def test_reference(tmp_path):
    predictions = write(tmp_path / "p.tsv", "a\t1.0\t1.0", "b\t0.0\t-0.333333")
    reference = tmp_path / "utt2label"

    def run(text):
        reference.write_text(text)
        main(["--predictions", predictions, "--output", str(tmp_path / "s.json"), "--reference", str(reference)])

    run("a 1.0\nb -0.33333334\n")
    with pytest.raises(UserError, match=r"1 of the 3 utterances .* missing, the first is c"):
        run("a 1.0\nb -0.333333\nc 2\n")
    with pytest.raises(UserError, match=r"not in .* the first is b"):
        run("a 1.0\n")
    with pytest.raises(UserError, match="utterance b has the label"):
        run("a 1.0\nb 0.333333\n")
    with pytest.raises(UserError, match="not a number"):
        run("a 1.0\nb x\n")


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "sdumc.bin.score", "--output", str(tmp_path / "s.json"), "--predictions"]
    done = subprocess.run([*command, str(tmp_path / "p.tsv")], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    write(tmp_path / "p.tsv", "a\t1.0\t1.0")
    assert subprocess.run([*command, str(tmp_path / "p.tsv")], capture_output=True).returncode == 0
