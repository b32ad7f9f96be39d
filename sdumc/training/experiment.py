"""An exp folder: held by one training at a time, and read back by whoever uses its model."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from sdumc.data.dump import Dump
from sdumc.errors import UserError
from sdumc.files import write_text
from sdumc.model.network import SDUMC
from sdumc.training.checkpoint import AVERAGED, PACKED, VALID_BEST, load_into
from sdumc.training.settings import load_config, model_config

log = logging.getLogger("sdumc")


LOCK = ".lock"


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """:func:`lock_folder` for the time of a block; the folder is made if it is not there."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = lock_folder(folder)
        # A training that was waited for may have given the folder its final name, and taken the lock along.
        if (folder / LOCK).exists() and os.path.samestat(os.stat(folder / LOCK), os.fstat(descriptor)):
            break
        os.close(descriptor)
    try:
        yield
    finally:
        os.close(descriptor)


def lock_folder(exp_dir: Path, patience: float = 60.0) -> int:
    """Hold ``exp_dir`` for this process until it ends, however that happens.

    A run whose recipe was killed saves its state before it goes, so the next one waits a little.

    Returns:
        The descriptor that holds the lock; closing it gives the folder up.

    Raises:
        UserError: another training still works there after ``patience`` seconds.
    """
    descriptor = os.open(exp_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    deadline, told = time.monotonic() + patience, False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise UserError(f"{exp_dir}: another training works in this folder; wait for it or stop it") from None
            if not told:
                log.info("%s: another training works here; waiting for it to end", exp_dir)
                told = True
            time.sleep(0.2)
        except OSError:  # a file system without locks
            return descriptor


def log_to(path: Path) -> logging.Handler:
    """Log to a file too, in the format of the screen; a run that goes on appends."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.getLogger().handlers[0].formatter)
    logging.getLogger().addHandler(handler)
    return handler


def write_extractors(exp_dir: Path, train: Dump) -> None:
    """Keep how the train set's features were made beside the model: a new clip must be treated in the same way."""
    meta = {name: feature.meta for name, feature in train.features.items() if feature.meta}
    write_text(exp_dir / "extractors.yaml", yaml.safe_dump(meta, sort_keys=True))


def load_model(exp_dir: Path, which: str = "valid-best") -> SDUMC:
    """The trained network in evaluation mode, on the CPU.

    Args:
        exp_dir: an exp folder, or a packed one, which has one model only.
        which: ``valid-best``, which training chose, or ``averaged``, the mean of the best epochs in any case.

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
