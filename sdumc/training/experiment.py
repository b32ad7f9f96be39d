"""An exp folder read back: the settings it was trained with, and its model."""

from __future__ import annotations

from pathlib import Path

from sdumc.model.network import SDUMC
from sdumc.training.checkpoint import AVERAGED, PACKED, VALID_BEST, load_into
from sdumc.training.settings import load_config, model_config


def load_model(exp_dir: Path, which: str = "valid-best") -> SDUMC:
    """The trained network in evaluation mode, on the CPU.

    Args:
        exp_dir: an exp folder, or a packed one, which has one model only.
        which: ``valid-best``, the epoch that is best on valid, or ``averaged``, the mean of the best epochs.

    Raises:
        UserError: the folder lacks a file or the files do not belong together.
    """
    model = SDUMC(model_config(load_config(exp_dir)))
    load_into(model, weights_file(exp_dir, which))
    return model.eval()


def weights_file(exp_dir: Path, which: str = "valid-best") -> Path:
    """Where the weights of :func:`load_model` are, or should be."""
    trained, packed = exp_dir / (VALID_BEST if which == "valid-best" else AVERAGED), exp_dir / PACKED
    return packed if packed.exists() and not trained.exists() else trained
