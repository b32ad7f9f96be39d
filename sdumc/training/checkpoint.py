"""An exp folder: held by one training at a time, and what survives a kill in it.

That is the state of a run in its checkpoint, the weights of the best epochs, and their average.
:class:`TrainingState` is all that a run is between two steps, with the random generators of its ranks. It is saved
whole. A packed model (:mod:`sdumc.prediction.package`) has the weights of one epoch or of the average.
"""

from __future__ import annotations

import fcntl
import io
import logging
import os
import pickle
import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor, nn

from sdumc.data.dump import Dump
from sdumc.errors import UserError
from sdumc.files import atomic_write, write_text
from sdumc.model.network import SDUMC
from sdumc.training.settings import CONFIG, load_config, model_config


@dataclass
class SavedState:
    """A dataclass that goes into a checkpoint: tensors, plain values, and what has a ``state_dict`` itself."""

    def state_dict(self) -> dict[str, Any]:
        """Every field, as tensors and plain values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: x.state_dict() if hasattr(x, "state_dict") else x for name, x in values.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`; models and optimisers stay on their device."""
        for f in fields(self):
            own = getattr(self, f.name)
            if hasattr(own, "load_state_dict"):
                own.load_state_dict(state[f.name])
            else:
                setattr(self, f.name, state[f.name])


@dataclass
class TrainingState(SavedState):
    """The state of a main training run. A run that continues from it ends with the files of an uninterrupted one.

    Attributes:
        model, optimiser: with all they have learned.
        epoch: the one in progress, from 1.
        batches_done: global batches of that epoch.
        step: optimiser steps since the start of the run.
        sums: each term of the objective, summed over this epoch's utterances so far.
        history: the record of each finished epoch.
        ranking: (value on valid, epoch) of the best epochs, lowest value first.
        rng: states of each rank's random generators at the last save.
    """

    model: nn.Module
    optimiser: torch.optim.Optimizer
    epoch: int = 1
    batches_done: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    ranking: list[tuple[float, int]] = field(default_factory=list)
    rng: list[list[Tensor]] = field(default_factory=list)

    def finish_step(self, terms: Mapping[str, Tensor], utterances: int) -> None:
        """Count a step on a global batch of so many utterances; ``terms`` are means over them."""
        self.step += 1
        self.batches_done += 1
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach()) * utterances

    def finish_epoch(self, record: dict[str, Any], keep: int) -> None:
        """Begin the next epoch. The ranking keeps the ``keep`` epochs with the lowest ``record["choice"]``."""
        self.history.append(record)
        self.ranking = sorted([*self.ranking, (record["choice"], self.epoch)])[:keep]
        self.epoch, self.batches_done, self.sums = self.epoch + 1, 0, {}

    @property
    def best_epochs(self) -> list[int]:
        """The epochs whose weights are kept, best first."""
        return [epoch for _, epoch in self.ranking]


def get_rng(device: torch.device) -> list[Tensor]:
    """State of this rank's random generators: the CPU's and, where it has one, the GPU's."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def set_rng(states: list[Tensor], device: torch.device) -> None:
    """Continue this rank's random generators from :func:`get_rng`."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


CHECKPOINT = "checkpoint.pt"
VALID_BEST = "model.valid-best.safetensors"
AVERAGED = "model.averaged.safetensors"
TOLERANCE = 0.05  # by how much the average's MAE on valid may exceed the best epoch's
CHOSEN = "chosen.yaml"  # the epochs whose mean VALID_BEST is, at the end of a run
PACKED = "model.safetensors"  # the only weights of a packed model
RECORD = "extractors.yaml"  # in it too: how its features were made
ARCHIVES = (".tar", ".tar.gz", ".tgz")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def save_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Write tensors as safetensors, atomically."""
    with atomic_write(path, "wb") as f:
        f.write(safetensors.torch.save({name: x.detach().cpu().contiguous() for name, x in state.items()}))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: the file is absent or damaged.
    """
    try:
        return with_statistics(safetensors.torch.load_file(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; has training finished an epoch? Run stage 4") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: damaged weights ({e}); remove the file and run stage 4 again") from None


def with_statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add mean 0 and deviation 1 of the features to weights of the first version, which did not normalise them."""
    for name in [name for name in state if re.fullmatch(r"frame_projection\.\w+\.weight", name)]:
        size, base = state[name].shape[1], name.removesuffix("weight")
        state.setdefault(f"{base}mean", torch.zeros(size))
        state.setdefault(f"{base}inverse_deviation", torch.ones(size))
    return state


def load_into(model: nn.Module, path: Path) -> None:
    """Load weights strictly.

    Raises:
        UserError: the weights do not belong to this model; the differences are named.
    """
    state, own = load_weights(path), model.state_dict()
    wrong = [f"missing {k}" for k in own if k not in state] + [f"unknown {k}" for k in state if k not in own]
    wrong += [
        f"{k} is {tuple(state[k].shape)}, not {tuple(v.shape)}"
        for k, v in own.items()
        if k in state and state[k].shape != v.shape
    ]
    if wrong:
        raise UserError(f"{path}: not weights of the model in config.yaml: " + "; ".join(wrong[:5]))
    model.load_state_dict(state)


def save_checkpoint(path: Path, state: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write a run's state and the settings that made it, atomically: the previous file stays until this one is whole.

    Raises:
        UserError: the disk is full or not writable; the previous checkpoint is untouched.
    """
    content = io.BytesIO()
    # In memory first: when a write to a file fails, torch's own writer hides the reason.
    torch.save({**state, "settings": dict(settings)}, content)
    with atomic_write(path, "wb") as f:
        f.write(content.getbuffer())


def load_checkpoint(
    path: Path, settings: Mapping[str, Any], may_change: Collection[str] = (), elsewhere: str = "another folder"
) -> dict[str, Any] | None:
    """Read a checkpoint (weights-only: tensors and plain values), or None where there is none.

    Args:
        settings: those of the run that is to continue from it.
        may_change: names of settings that do not change the result.
        elsewhere: how the user gives another folder, for the message "or give ...".

    Raises:
        UserError: the file is damaged or of another version, or was made with other settings, which are named.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, ValueError) as e:
        why = str(e).partition(". ")[0]  # torch's message is a paragraph
        raise UserError(f"{path}: damaged checkpoint ({why}); remove it to train from the start") from None
    old = state.pop("settings", {})
    if old.keys() != settings.keys():
        names = ", ".join(sorted(old.keys() ^ settings.keys())) if old else "all"
        raise UserError(
            f"{path}: a checkpoint of another version of this program, whose settings differ in name: {names}. Go on "
            "with that version, or remove the file to train from the start"
        )
    if changed := differences(old, settings, may_change):
        raise UserError(
            f"{path.parent}: its checkpoint was made with other settings: {'; '.join(changed)}. Go on with the old "
            f"ones, or give {elsewhere}, or remove the folder"
        )
    return state


def differences(old: Mapping[str, Any], new: Mapping[str, Any], may_change: Collection[str] = ()) -> list[str]:
    """`name: old -> new` of each setting that differs, unless it is among ``may_change``."""
    return [f"{k}: {old[k]} -> {new[k]}" for k in sorted(new) if k not in may_change and old[k] != new[k]]


# ------------------------------------------------------------------------------------------- weights of the best epochs
# Which epochs are kept is part of the checkpoint, and all other files are made from the epochs' files. So after a kill
# between two writes, the next call of `keep_best` corrects the folder.


def epoch_file(exp_dir: Path, epoch: int) -> Path:
    """Where the weights of an epoch are, while it is among the best."""
    return exp_dir / "epochs" / f"epoch-{epoch:03d}.safetensors"


def keep_best(exp_dir: Path, epochs: Sequence[int]) -> None:
    """Copy the weights of the first of ``epochs`` (best first) to VALID_BEST, and remove those of all other epochs.

    Call it after the checkpoint with this ranking is on disk.
    """
    if not epochs:
        return
    content = epoch_file(exp_dir, epochs[0]).read_bytes()
    best = exp_dir / VALID_BEST
    if not best.exists() or best.read_bytes() != content:
        with atomic_write(best, "wb") as f:
            f.write(content)
    kept = {epoch_file(exp_dir, epoch) for epoch in epochs}
    for path in (exp_dir / "epochs").iterdir():
        if path not in kept:
            path.unlink()


def average_best(exp_dir: Path, epochs: Sequence[int]) -> None:
    """Write the mean of the epochs' weights, added up in float64."""
    states = [load_weights(epoch_file(exp_dir, epoch)) for epoch in sorted(epochs)]
    mean = {
        name: torch.stack([s[name].double() for s in states]).mean(0).to(value.dtype)
        for name, value in states[0].items()
    }
    save_weights(exp_dir / AVERAGED, mean)


def choose(exp_dir: Path, ranking: Sequence[tuple[float, int]], averaged: float) -> tuple[float, list[int]]:
    """Make VALID_BEST the average of the best epochs, unless its MAE on valid, ``averaged``, is clearly worse.

    The best epoch's MAE is the lowest of many, so it is too low by chance; the average was not chosen among others.

    Args:
        ranking: MAE on valid and number of the best epochs, best first.

    Returns:
        The MAE of what was chosen, and its epochs; also written to CHOSEN.
    """
    mae, epochs = ranking[0][0], [ranking[0][1]]
    if len(ranking) > 1 and averaged <= (1 + TOLERANCE) * mae:
        mae, epochs = averaged, sorted(epoch for _, epoch in ranking)
        with atomic_write(exp_dir / VALID_BEST, "wb") as f:
            f.write((exp_dir / AVERAGED).read_bytes())
    write_text(exp_dir / CHOSEN, yaml.safe_dump({"epochs": epochs, "mae": round(mae, 6)}, sort_keys=True))
    return mae, epochs


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


def is_archive(path: Path) -> bool:
    """Whether the name is that of an archive."""
    return path.name.endswith(ARCHIVES)


def hub_pack(name: str) -> Path | None:
    """The packed folder, or the only archive, of a model in the hub's cache; None if ``name`` is not ``OWNER/NAME``.

    Raises:
        UserError: it is not there, not whole, or none of ours.
    """
    if not _HUB_NAME.fullmatch(name) or is_archive(Path(name)):
        return None
    from huggingface_hub import constants, snapshot_download

    fetch = f"fetch it once, with a network: hf download {name}"
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except Exception:  # its errors differ between versions, and say to look at the network
        raise UserError(
            f"{name}: no such experiment folder, packed folder or archive here. If it is a name on the hub: that "
            f"is not in the cache {constants.HF_HUB_CACHE}; {fetch}"
        ) from None
    if not (folder / RECORD).is_file():
        archives = [p for p in folder.iterdir() if is_archive(p) and p.is_file()]
        if len(archives) != 1:
            raise UserError(f"{name}: {folder} has no {RECORD}: no model of `sdumc pack`, or not whole; {fetch}")
        return archives[0]
    if missing := [file for file in (CONFIG, PACKED) if not (folder / file).is_file()]:
        raise UserError(f"{name}: {folder} is not whole, it has no {missing[0]}; {fetch}")
    return folder
