"""The training runs that a report is about: settings, curves, size of the model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from sdumc.errors import UserError
from sdumc.files import read_yaml

_RECORDED = ("seed", "train-dir", "valid-dir")  # settings that the report rests on


@dataclass
class Run:
    """One training run, i.e. one seed."""

    path: Path
    config: dict
    history: list[dict]  # one entry an epoch, as in metrics.jsonl
    parameters: int | None  # numbers in the saved model; None where it was removed

    @property
    def seed(self) -> str:
        return str(self.config["seed"])

    @property
    def best_epoch(self) -> int:
        """The epoch that training chose: the first with the lowest MAE on the valid set, averaged over conditions."""
        return min(self.history, key=_choice)["epoch"]

    @property
    def best_mae(self) -> float:
        """The mean MAE over conditions on the valid set at the best epoch."""
        return min(map(_choice, self.history))


def _choice(entry: dict) -> float:
    return math.inf if entry["choice"] is None else float(entry["choice"])


def collect_runs(exp_dirs: Sequence[str | Path]) -> list[Run]:
    """Read the settings and training curves of each run.

    Raises:
        UserError: a folder is not there, was not trained, or two of them are the same seed.
    """
    runs: list[Run] = []
    for path in map(Path, exp_dirs):
        if not path.is_dir():
            raise UserError(f"{path}: no such experiment folder; train it first (stage 4)")
        history = read_history(path / "metrics.jsonl")
        config = read_yaml(path / "config.yaml")
        for key in _RECORDED:
            if key not in config:
                raise UserError(f"{path}/config.yaml: has no {key}; is {path} a folder that training (stage 4) wrote?")
        run = Run(path, config, history, count_parameters(path))
        for other in runs:
            if other.seed == run.seed:
                raise UserError(
                    f"{path} and {other.path} are both seed {run.seed}; a spread over seeds needs different ones"
                )
        runs.append(run)
    return runs


def used_set(runs: Sequence[Run], key: str, given: str | None) -> str:
    """The name of the set that the runs were trained on (``key`` = train-dir) or chosen by (valid-dir).

    Raises:
        UserError: it is not the one given, or the runs do not agree.
    """
    recorded = {Path(str(run.config[key])).name: run for run in runs}
    if len(recorded) > 1:
        raise UserError(
            f"--exp-dirs: the runs differ in {key}: {', '.join(f'{r.path} has {n}' for n, r in recorded.items())}; "
            "only runs that differ in their seed belong into one report"
        )
    ((name, run),) = recorded.items()
    if given not in (None, name):
        raise UserError(f"{run.path}/config.yaml: {key} is {run.config[key]}, not the set {given} that was given")
    return name


def read_history(path: Path) -> list[dict]:
    """Read ``metrics.jsonl``, one object an epoch.

    Raises:
        UserError: the file is missing or empty, or a line is not what training writes.
    """
    history = []
    try:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, start=1):
                try:
                    entry = json.loads(line)
                    complete = {"epoch", "train", "valid", "choice"} <= entry.keys()
                except (ValueError, AttributeError):
                    complete = False
                if not complete:
                    raise UserError(f"{path}:{number}: not the record of an epoch; train again (stage 4)")
                history.append(entry)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); train this run first (stage 4)") from None
    if not history:
        raise UserError(f"{path}: no epoch was finished; go on with the training (stage 4)")
    return history


def count_parameters(exp_dir: Path) -> int | None:
    """How many numbers the saved model has, from the header of its file; None if the file was removed."""
    path = exp_dir / "model.valid-best.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="np") as f:
            return sum(math.prod(f.get_slice(name).get_shape()) for name in f.keys())  # noqa: SIM118 (not a dict)
    except SafetensorError as e:
        raise UserError(f"{path}: not a whole safetensors file ({e}); train this run again (stage 4)") from None
