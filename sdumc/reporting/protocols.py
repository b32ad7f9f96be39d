"""The protocols of incomplete data in a report: a table for each, the mean over its rows, and curves over rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sdumc.conditions import CONDITIONS, PROTOCOL_RECORD, PROTOCOLS
from sdumc.errors import UserError
from sdumc.files import read_yaml
from sdumc.reporting.drawing import LINES, MARKERS, Figure, Panel, Theme, legend_below
from sdumc.reporting.scores import Row
from sdumc.reporting.sets import Run, TestSet
from sdumc.scoring.metrics import UNDEFINED, Bootstrap, clusters_of, read_predictions, score

_CURVES = ("mae", "f1_non0")  # what figures show


@dataclass
class ProtocolTable:
    """Scores under one protocol: a row for each pattern or rate, and last their mean."""

    protocol: str
    condition: str  # what is damaged; empty for patterns
    rows: list[Row]
    rates: list[float]  # of the rows but the last; empty for patterns
    lost: list[float]  # share that was lost at each rate
    measures: dict[str, str]  # key: title

    @property
    def title(self) -> str:
        what = PROTOCOLS[self.protocol].given
        return f"{self.protocol}, of {self.condition}: {what}" if self.condition else f"{self.protocol}: {what}"

    @property
    def first_column(self) -> str:
        return "r (lost)" if self.rates else "given"


def protocol_tables(runs: Sequence[Run], test_set: TestSet) -> list[ProtocolTable]:
    """A table for each protocol and each condition that it was decoded from, over all runs.

    Raises:
        UserError: only some of the runs were decoded, or not with the same masks or utterances.
    """
    tables = []
    rounding = next(iter(test_set.conditions.values())).scores[0]["rounding"]
    bootstrap = None
    for protocol, meant in PROTOCOLS.items():
        folders = [run.path / f"decode_{test_set.name}" / "protocols" / protocol for run in runs]
        records = [read_record(folder) for folder in folders]
        record = records[0]
        if any(other != record for other in records):
            raise UserError(
                f"{folders[0]}: not all seeds were decoded with this protocol, or with other masks or conditions; run "
                f"stage 5 with --protocols {protocol} for all of them"
            )
        if record is None:
            continue
        if bootstrap is None:
            speakers = clusters_of(test_set.utterances, test_set.speakers, f"utt2spk of {test_set.name}")
            bootstrap = Bootstrap(test_set.labels, speakers, rounding, test_set.scale)
        rates = list(record["rates"]) if meant.rates else []
        parts = {c: [c] for c in record["conditions"]} if rates else {"": list(record["conditions"])}
        for condition, names in parts.items():
            places = [f"{condition}/{rate:.1f}" for rate in rates] or names
            lost = list(record["lost"][condition]) if rates else []
            titles = [f"{r:.1f} ({100 * x:.0f}%)" for r, x in zip(rates, lost, strict=True)]
            titles = titles or [CONDITIONS[n].given.partition(":")[0] for n in names]
            found = {
                title: np.stack([_predictions(folder / place, test_set) for folder in folders])
                for title, place in zip(titles, places, strict=True)
            }
            rows = _rows(found, test_set.labels, bootstrap, "rates" if rates else "patterns")
            tables.append(ProtocolTable(protocol, condition, rows, rates, lost, test_set.scale.measures))
    return tables


def read_record(folder: Path) -> dict[str, Any] | None:
    """``protocol.yaml`` of a protocol's folder; None where it was not decoded, or not to the end."""
    path = folder / PROTOCOL_RECORD
    if not path.is_file():
        return None
    record = read_yaml(path)
    if record.get("protocol") not in PROTOCOLS or not isinstance(record.get("conditions"), list):
        raise UserError(f"{path}: not the record of a protocol; decode it again (stage 5)")
    return record


def _predictions(folder: Path, test_set: TestSet) -> np.ndarray:
    table = read_predictions(folder / "predictions.tsv")
    if table.ids != test_set.utterances or not np.allclose(table.labels, test_set.labels, atol=1e-6):
        raise UserError(f"{table.path}: not about the utterances and labels of {test_set.name}; decode again (stage 5)")
    return table.predictions


def _rows(found: Mapping[str, np.ndarray], labels: np.ndarray, bootstrap: Bootstrap, of: str) -> list[Row]:
    """A row for each (R, N) of ``found``, and their mean, whose interval is that of the mean."""
    means, resampled, measures = {}, {}, bootstrap.scale.measures
    for title, predictions in found.items():
        scores = [score(p, labels, bootstrap.rounding, bootstrap.scale) for p in predictions]
        means[title] = {m: float(np.mean([s[m] for s in scores])) for m in measures}
        resampled[title] = bootstrap.resample(predictions)
    title = f"mean over {len(found)} {of}"
    all_means = {m: float(np.mean([v[m] for v in means.values()])) for m in measures}
    all_resampled = {m: np.mean([v[m] for v in resampled.values()], axis=0) for m in measures}
    rows = []
    for name, values, draws in (*((t, means[t], resampled[t]) for t in found), (title, all_means, all_resampled)):
        cells = {m: (v, UNDEFINED if np.isnan(v) else bootstrap.limits(draws[m])) for m, v in values.items()}
        rows.append(Row(name, "mean" if name == title else "model", "", cells))
    return rows


def protocol_figures(name: str, tables: Sequence[ProtocolTable]) -> list[Figure]:
    """Curves over the rates for each protocol that has them, and the patterns side by side."""
    figures = []
    for protocol in dict.fromkeys(t.protocol for t in tables):
        own = [t for t in tables if t.protocol == protocol]
        draw = _draw_curves if own[0].rates else _draw_patterns
        figures.append(
            Figure(
                f"{name}_protocol_{protocol}",
                f"Protocol {protocol}",
                f"{PROTOCOLS[protocol].given[0].upper()}{PROTOCOLS[protocol].given[1:]}. "
                f"{'Bands' if own[0].rates else 'Whiskers'} are 95% intervals.",
                [
                    Panel(partial(draw, tables=own, measure=m), f"{own[0].measures[m]} under the protocol {protocol}")
                    for m in _curves(own[0])
                ],
            )
        )
    return figures


def _curves(table: ProtocolTable) -> tuple[str, ...]:
    """The measures that are drawn: the MAE, and a two-class accuracy or the first that the scale has."""
    others = [m for m in _CURVES if m in table.measures and m != "mae"] or [m for m in table.measures if "acc" in m]
    return ("mae", *others[:1])


def _cells(table: ProtocolTable, measure: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means and limits (K,) of all rows but the mean, in the unit of tables."""
    factor = 1 if measure == "mae" else 100
    cells = [row.values[measure] for row in table.rows[:-1]]
    mean, low, high = (factor * np.array(x) for x in zip(*((m, *limits) for m, limits in cells), strict=True))
    return mean, low, high


def _draw_curves(ax: Axes, theme: Theme, tables: Sequence[ProtocolTable], measure: str) -> None:
    for i, table in enumerate(tables):
        mean, low, high = _cells(table, measure)
        colour = theme.colour(table.condition, i)
        ax.plot(
            table.rates,
            mean,
            color=colour,
            linestyle=LINES.get(table.condition, "-"),
            marker=MARKERS.get(table.condition, "v"),
            markersize=4,
            label=table.condition,
        )
        if not np.isnan(low).any():
            ax.fill_between(table.rates, low, high, color=colour, alpha=0.18, linewidth=0)
    title = tables[0].measures[measure]
    ax.set_title(title)
    ax.set_xlabel("rate r")
    ax.set_ylabel("mean absolute error" if measure == "mae" else f"{title} (%)")
    legend_below(ax)


def _draw_patterns(ax: Axes, theme: Theme, tables: Sequence[ProtocolTable], measure: str) -> None:
    mean, low, high = _cells(tables[0], measure)
    places = np.arange(len(mean))
    whiskers = None if np.isnan(low).any() else np.stack([mean - low, high - mean]).clip(0)
    ax.errorbar(mean, places, xerr=whiskers, fmt="o", color=theme.colour("full"), markersize=4, elinewidth=1)
    ax.set_yticks(places, [row.title for row in tables[0].rows[:-1]])
    ax.set_ylim(len(mean) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    title = tables[0].measures[measure]
    ax.set_title(title)
    ax.set_xlabel("mean absolute error" if measure == "mae" else f"{title} (%)")
