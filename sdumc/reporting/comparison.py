"""Several experiments on one set: a measure by condition, and paired differences from the first experiment."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdumc.data.tables import read_table
from sdumc.errors import UserError
from sdumc.reporting.sets import read_score
from sdumc.scoring.intervals import Bootstrap, clusters_of, format_difference, judge
from sdumc.scoring.metrics import Predictions, read_predictions


@dataclass
class Results:
    """What the runs of one experiment predict under one condition, by seed."""

    tables: dict[int, Predictions]
    scores: dict[int, float]  # of one measure
    rounding: str

    def predictions(self, seeds: Sequence[int]) -> np.ndarray:
        """Those of some runs: (R, N)."""
        return np.stack([self.tables[seed].predictions for seed in seeds])

    def mean(self, seeds: Sequence[int]) -> float:
        """The measure's mean over some runs."""
        return float(np.mean([self.scores[seed] for seed in seeds]))


def compare(
    experiments: Sequence[str], conditions: Sequence[str], measure: str, test_set: str, data_root: Path
) -> tuple[list[list[str]], list[str]]:
    """The rows of the table (experiment, a cell per condition, seeds), and notes below it.

    Raises:
        UserError: an experiment has no seed, or a run was not decoded or scored under a condition; a measure is
            undefined; two runs are not about the same utterances and labels.
    """
    found = [{c: collect(e, test_set, c, measure) for c in conditions} for e in experiments]
    first = found[0][conditions[0]]
    table = next(iter(first.tables.values()))
    check_same(table, [t for by_condition in found for r in by_condition.values() for t in r.tables.values()])
    path = data_root / test_set / "utt2spk"
    speakers = clusters_of(table.ids, read_table(path) if path.is_file() else {}, path)
    bootstrap = Bootstrap(table.labels, speakers, first.rounding)

    rows, notes = [], [f"Intervals: bootstrap over {bootstrap.unit} and over seeds."]
    if speakers is None:
        notes.append(f"There is no {path}: utterances were resampled, and the true intervals are wider.")
    for experiment, by_condition in zip(experiments, found, strict=True):
        name = Path(experiment).name
        seeds = list(by_condition[conditions[0]].scores)
        cells = []
        for condition, results in by_condition.items():
            reference = found[0][condition] if by_condition is not found[0] else None
            cells.append(_cell(results, reference, measure, bootstrap))
        common = [seed for seed in seeds if seed in first.scores]
        if common != seeds or (common != list(first.scores)):
            those = f"over seed {', '.join(map(str, common))} only" if common else "not given: no seed is in both"
            notes.append(f"{name}: its seeds are not those of {Path(experiments[0]).name}; the difference is {those}.")
        rows.append([name.replace("_", " "), *cells, str(len(seeds))])
    return rows, notes


def _cell(results: Results, reference: Results | None, measure: str, bootstrap: Bootstrap) -> str:
    """``0.579 [0.531, 0.634] (-0.060 [-0.081, -0.040], better)``."""
    seeds = list(results.scores)
    low, high = bootstrap.intervals(results.predictions(seeds))[measure]
    text = f"{results.mean(seeds):.3f}" + ("" if math.isnan(low) else f" [{low:.3f}, {high:.3f}]")
    common = [seed for seed in seeds if reference and seed in reference.scores]
    if reference is None or not common:
        return text
    own, other = (bootstrap.resample(r.predictions(common))[measure] for r in (results, reference))
    interval = bootstrap.limits(own - other)
    words = [format_difference(results.mean(common) - reference.mean(common), interval), judge(measure, interval)]
    return f"{text} ({', '.join(filter(None, words))})"


def collect(experiment: str, test_set: str, condition: str, measure: str) -> Results:
    """Read what all seeds of an experiment predict, and their scores.

    Raises:
        UserError: no seed is there, or one was not decoded or scored under the condition.
    """
    base = Path(experiment)
    folders = {}
    for path in base.parent.glob(f"{base.name}_seed*"):
        if match := re.fullmatch(re.escape(base.name) + r"_seed(\d+)", path.name):
            folders[int(match[1])] = path
    if not folders:
        raise UserError(f"{experiment}_seed*: no such experiment; train it with `run.sh --exp-tag {base.name}`")
    results = Results({}, {}, "")
    for seed, exp in sorted(folders.items()):
        folder = exp / f"decode_{test_set}" / condition
        if not (folder / "predictions.tsv").is_file():
            raise UserError(f"{folder}/predictions.tsv: not there; run stage 5 with --conditions {condition}")
        table = read_predictions(folder / "predictions.tsv")
        scores = read_score(folder, table)
        if math.isnan(scores[measure]):
            raise UserError(f"{folder}/score.json: {measure} is undefined there; compare another measure")
        if results.rounding not in ("", scores["rounding"]):
            raise UserError(f"{folder}/score.json: rounding {scores['rounding']}, other seeds have {results.rounding}")
        results.tables[seed], results.scores[seed], results.rounding = table, scores[measure], scores["rounding"]
    return results


def check_same(first: Predictions, tables: Sequence[Predictions]) -> None:
    """Refuse predictions for other utterances or labels than those of the first."""
    for table in tables:
        if table.ids != first.ids or not np.allclose(table.labels, first.labels, atol=1e-6):
            raise UserError(
                f"{table.path} and {first.path} are not about the same utterances and labels: a difference would "
                "be one of test sets; decode both from the same data (stage 5)"
            )
