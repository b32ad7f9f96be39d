"""Decoding with several models: the mean of their predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.dumps import make_dump

from sdumc.bin.decode import main
from sdumc.errors import UserError
from sdumc.hyperparameters import ModelConfig
from sdumc.model.network import SDUMC
from sdumc.scoring.metrics import read_predictions


def load(exp: Path, which: str) -> SDUMC:
    """A network of random weights: ``deaf`` reads no audio; other names end in their seed."""
    torch.manual_seed(0 if exp.name == "deaf" else int(exp.name[-1]))
    audio = {} if exp.name == "deaf" else {"audio_dim": 6}
    return SDUMC(ModelConfig(**({"audio_dim": 0} | audio), text_dim=10, video_dim=5, dim=16, content_dim=8)).eval()


def test_mean_of_the_predictions(tmp_path, monkeypatch):
    monkeypatch.setattr("sdumc.training.checkpoint.load_model", load)
    dump = make_dump(tmp_path / "dump", count=12)
    common = ["--data-dir", str(dump), "--device", "cpu", "--condition", "full", "none"]
    for exps in (["a_seed1"], ["a_seed2"], ["a_seed1", "a_seed2"]):
        main(["--exp-dir", *exps, *common, "--output-dir", str(tmp_path / "+".join(exps))])
    for condition in ("full", "none"):
        one, two, both = (
            read_predictions(tmp_path / name / condition / "predictions.tsv")
            for name in ("a_seed1", "a_seed2", "a_seed1+a_seed2")
        )
        assert both.ids == one.ids and np.array_equal(both.labels, one.labels)
        assert not np.allclose(one.predictions, two.predictions, atol=1e-3)
        np.testing.assert_allclose(both.predictions, (one.predictions + two.predictions) / 2, atol=2e-6)
    names = {p.name for p in (tmp_path / "a_seed1+a_seed2/full").iterdir()}
    assert names == {"predictions.tsv", "condition.yaml", "scale.yaml"}
    main(["--exp-dir", "a_seed1", "a_seed2", *common, "--output-dir", str(tmp_path / "a_seed1")])
    assert not (tmp_path / "a_seed1/full/internals.npz").exists()  # of one model only

    with pytest.raises(
        UserError, match=r"condition full: a_seed1 reads audio, text, video; deaf reads text, video; only"
    ):
        main(["--exp-dir", "a_seed1", "deaf", *common, "--output-dir", str(tmp_path / "x")])
    assert not (tmp_path / "x").exists()
