"""What a training run is between two steps: one object that is saved whole, and the random generators of its ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn


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
