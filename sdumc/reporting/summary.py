"""The numbers and words of a report, computed once for RESULTS.md and for the page."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sdumc.data.dump import Dump, load_dump
from sdumc.errors import UserError
from sdumc.reporting import facts
from sdumc.reporting.baselines import fit_ridges
from sdumc.reporting.runs import Run
from sdumc.reporting.scores import SetSummary, summarise_set
from sdumc.reporting.sets import TestSet
from sdumc.scoring.choice import doubts, median_mae


@dataclass
class Summary:
    title: str
    runs: list[Run]
    train_set: str
    valid_set: str
    sets: list[SetSummary]
    data: list[dict[str, str]]  # per set: utterances, speakers, left out
    quality: list[dict[str, str]]  # per set: how good the simulated text is
    features: list[dict[str, str]]  # per feature: dimension, frame rate, model ...
    settings: dict[str, str]  # what all runs share
    own_settings: dict[str, list[str]]  # what differs between them
    versions: dict[str, str]
    notes: list[str] = field(default_factory=list)  # what the report lacks, and how to have it

    @property
    def seeds(self) -> str:
        names = ", ".join(run.seed for run in self.runs)
        return f"seed {names}" if len(self.runs) == 1 else f"{len(self.runs)} seeds ({names})"

    @property
    def parameters(self) -> str:
        counts = sorted({f"{run.parameters:,}" for run in self.runs if run.parameters is not None})
        return " / ".join(counts) if counts else "unknown"

    @property
    def chosen_epochs(self) -> list[int]:
        return [run.best_epoch for run in self.runs]


def summarise(
    title: str,
    runs: list[Run],
    test_sets: list[TestSet],
    train_set: str,
    valid_set: str,
    data_root: Path,
    dump_root: Path,
) -> Summary:
    """Compute everything that the report states.

    Raises:
        UserError: a dump folder is there but broken, or belongs to other utterances than the predictions.
    """
    names = list(dict.fromkeys([train_set, valid_set, *(s.name for s in test_sets)]))
    dumps = _load_dumps(names, test_sets, dump_root)
    ridges, notes = fit_ridges(dumps, train_set, valid_set, dump_root)
    sets = [summarise_set(s, runs, ridges, dumps.get(train_set)) for s in test_sets]
    for part in sets:
        if part.test_set.name in (train_set, valid_set):
            use = "trained on" if part.test_set.name == train_set else "used to choose the epoch and the penalties"
            part.notes.insert(0, f"This set was {use}: its scores say little about other data.")
    if not any(run.parameters for run in runs):
        notes.append("No saved model in the experiment folders: the number of parameters is unknown.")
    notes += doubts_of(runs, dumps.get(train_set), dumps.get(valid_set))
    shared, own = facts.settings(runs)
    quality = facts.quality_rows(names, dump_root)
    if not quality:
        notes.append(f"No text was simulated or recognised for {dump_root} (stage 2): there is no quality to state.")
    return Summary(
        title=title,
        runs=runs,
        train_set=train_set,
        valid_set=valid_set,
        sets=sets,
        data=facts.data_rows(names, dumps, data_root, dump_root),
        quality=quality,
        features=facts.feature_rows(dumps.get(train_set)),
        settings=shared,
        own_settings=own,
        versions=facts.versions(),
        notes=notes,
    )


def doubts_of(runs: list[Run], train: Dump | None, valid: Dump | None) -> list[str]:
    """Runs that were too short or have learned nothing; the latter needs the labels of both sets."""
    median = median_mae(train.labels.values(), valid.labels.values()) if train and valid else None
    return [
        f"Seed {run.seed}: {doubt}."
        for run in runs
        for doubt in doubts(run.best_epoch, run.history[-1]["epoch"], run.best_mae, median)
    ]


def _load_dumps(names: list[str], test_sets: list[TestSet], dump_root: Path) -> dict[str, Dump]:
    """The dump folders that are there, by set; a report can be made without them."""
    dumps: dict[str, Dump] = {}
    for name in names:
        if (dump_root / name / "utt2label").is_file():
            dumps[name] = load_dump(dump_root / name)
            features = dumps[name].features.items()
            dumps[name].features = {n: f for n, f in features if f.dim}  # 0: absent throughout, of unknown dimension
    for test_set in test_sets:
        if test_set.name in dumps and dumps[test_set.name].utterances != test_set.utterances:
            raise UserError(
                f"{dump_root / test_set.name}: its utterances are not those that were decoded; decode again (stage 5)"
            )
    return dumps
