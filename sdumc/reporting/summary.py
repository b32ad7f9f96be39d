"""The numbers of a report, computed once for RESULTS.md and for the page."""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sdumc import __version__
from sdumc.data.dropped import read_dropped
from sdumc.data.dump import Dump, load_dump
from sdumc.data.tables import read_table
from sdumc.errors import UserError
from sdumc.files import read_json
from sdumc.reporting.baselines import fit_ridge, pooled
from sdumc.reporting.collect import Run, TestSet
from sdumc.scoring.metrics import MEASURES, score

MEASURE_NAMES = {
    "mae": "MAE",
    "corr": "Corr",
    "acc7": "Acc-7",
    "acc5": "Acc-5",
    "acc3": "Acc-3",
    "acc2_has0": "Acc-2 has0",
    "f1_has0": "F1 has0",
    "acc2_non0": "Acc-2 non0",
    "f1_non0": "F1 non0",
}
# The condition that each ridge regression has the same modalities as.
RIDGE_FEATURES = {
    "full": ("audio", "text", "video"),
    "missing": ("audio", "text_sim", "video"),
    "asr": ("audio", "text_asr", "video"),
    "none": ("audio", "video"),
}
STATES = ("ok", "empty", "refusal", "repeat")


@dataclass
class Row:
    """One line of a table of scores: the mean over seeds, and the sample standard deviation where there are several."""

    title: str
    kind: str  # model, ridge or median
    condition: str
    values: dict[str, tuple[float, float | None]]

    def text(self, measure: str) -> str:
        """``0.512 ± 0.008`` for MAE and correlation, ``81.2 ± 0.6`` (per cent) for the others; – if undefined."""
        return format_value(measure, *self.values[measure])


@dataclass
class SetSummary:
    test_set: TestSet
    rows: list[Row]
    recovered: tuple[float, float | None]  # share of the gap between none and full; NaN where undefined
    findings: list[tuple[bool, str]]  # whether it holds, and what
    notes: list[str]
    penalties: dict[str, float]  # of the ridge regression per condition

    def row(self, kind: str, condition: str) -> Row | None:
        return next((r for r in self.rows if r.kind == kind and r.condition == condition), None)


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
        return [best_epoch(run.history) for run in self.runs]


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
    notes: list[str] = []
    names = [train_set, valid_set, *(s.name for s in test_sets)]
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
    ridges = _fit_ridges(dumps, train_set, valid_set, dump_root, notes)
    sets = [_summarise_set(s, runs, ridges, dumps.get(train_set)) for s in test_sets]
    for part in sets:
        if part.test_set.name in (train_set, valid_set):
            use = "trained on" if part.test_set.name == train_set else "used to choose the epoch and the penalties"
            part.notes.insert(0, f"This set was {use}: its scores say little about other data.")
    if not any(run.parameters for run in runs):
        notes.append("No saved model in the experiment folders: the number of parameters is unknown.")
    shared, own = _settings(runs)
    quality = _quality(names, dump_root)
    if not quality:
        notes.append(f"No text was simulated or recognised for {dump_root} (stage 2): there is no quality to state.")
    return Summary(
        title=title,
        runs=runs,
        train_set=train_set,
        valid_set=valid_set,
        sets=sets,
        data=_data(names, dumps, data_root, dump_root),
        quality=quality,
        features=_features(dumps.get(train_set)),
        settings=shared,
        own_settings=own,
        versions=_versions(),
        notes=notes,
    )


def best_epoch(history: list[dict]) -> int:
    """The epoch with the lowest MAE on the valid set, averaged over the conditions that training looks at.

    Training records what it chose by as ``choice``; the first of equals is kept.
    """
    scored = []
    for entry in history:
        by_condition = [c["mae"] for c in entry.get("valid", {}).values()]
        value = entry.get("choice", np.mean(by_condition) if by_condition else None)
        if value is not None:
            scored.append((value, entry["epoch"]))
    return int(min(scored)[1]) if scored else int(history[-1]["epoch"])


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1) of one value a seed; no deviation for a single seed."""
    v = np.asarray(values, dtype=np.float64)
    return float(v.mean()), float(v.std(ddof=1)) if v.size > 1 else None


def format_value(measure: str, mean: float, deviation: float | None) -> str:
    if math.isnan(mean):
        return "–"
    factor, digits = (1, 3) if measure in ("mae", "corr") else (100, 1)
    text = f"{factor * mean:.{digits}f}"
    return text if deviation is None else f"{text} ± {factor * deviation:.{digits}f}"


def _fit_ridges(
    dumps: dict[str, Dump], train_set: str, valid_set: str, dump_root: Path, notes: list[str]
) -> dict[str, tuple]:
    """One fitted regression per condition: condition -> (names, Ridge, pooled features of every set)."""
    if train_set not in dumps or valid_set not in dumps:
        notes.append(f"No baselines: {dump_root} lacks {train_set} or {valid_set}.")
        return {}
    cache: dict[tuple[str, str], np.ndarray] = {}

    def get(dataset: str, name: str) -> np.ndarray:
        if (dataset, name) not in cache:
            cache[dataset, name] = pooled(dumps[dataset], name)
        return cache[dataset, name]

    ridges = {}
    for condition, wanted in RIDGE_FEATURES.items():
        names = tuple(n for n in wanted if n in dumps[train_set].features)
        text = [n for n in wanted if n.startswith("text")]
        if not names or (text and text[0] not in names):
            continue
        for name in names:
            dims = {d: dumps[d].features[name].dim for d in dumps if name in dumps[d].features}
            if len(set(dims.values())) > 1:
                raise UserError(f"{dump_root}: the feature {name} has different dimensions: {dims}; extract it again")
        if any(n not in dumps[valid_set].features for n in names):
            notes.append(f"No ridge regression on {' + '.join(names)}: {dump_root / valid_set} lacks one of them.")
            continue
        labels = [np.array([dumps[d].labels[u] for u in dumps[d].utterances]) for d in (train_set, valid_set)]
        ridge = fit_ridge([get(train_set, n) for n in names], labels[0], [get(valid_set, n) for n in names], labels[1])
        tests = {d: [get(d, n) for n in names] for d in dumps if all(n in dumps[d].features for n in names)}
        ridges[condition] = (names, ridge, tests)
    return ridges


def _summarise_set(test_set: TestSet, runs: list[Run], ridges: dict, train: Dump | None) -> SetSummary:
    rows = []
    for condition in test_set.conditions.values():
        values = {m: spread([s[m] for s in condition.scores]) for m in MEASURES}
        rows.append(Row(condition.title, "model", condition.name, values))
    first = next(iter(test_set.conditions.values())).scores[0]
    notes = []
    for name, (names, ridge, pooled_sets) in ridges.items():
        if test_set.name not in pooled_sets:
            notes.append(f"No ridge row for {name}: the dump of {test_set.name} lacks {' or '.join(names)}.")
            continue
        measures = score(ridge(pooled_sets[test_set.name]), test_set.labels, first["rounding"])
        values = {m: (measures[m], None) for m in MEASURES}
        rows.append(Row(f"ridge: {' + '.join(names)}", "ridge", name, values))
    if train is not None:
        median = float(np.median(list(train.labels.values())))
        measures = score(np.full(len(test_set.labels), median), test_set.labels, first["rounding"])
        values = {m: (measures[m], None) for m in MEASURES}
        rows.append(Row(f"median of the train labels ({median:.2f})", "median", "", values))
    seen = []
    for condition in test_set.conditions.values():
        for run, scores in zip(runs, condition.scores, strict=True):
            seen += [f"{condition.name}, seed {run.seed}: {note}" for note in scores["notes"]]
    penalties = {row.condition: ridges[row.condition][1].penalty for row in rows if row.kind == "ridge"}
    summary = SetSummary(test_set, rows, _recovered(test_set), [], notes + seen, penalties)
    summary.findings = _findings(summary)
    return summary


def _recovered(test_set: TestSet) -> tuple[float, float | None]:
    """(none - missing) / (none - full) of the MAE, seed by seed."""
    if not all(name in test_set.conditions for name in ("full", "missing", "none")):
        return math.nan, None
    mae = {c: np.array([s["mae"] for s in test_set.conditions[c].scores]) for c in ("full", "missing", "none")}
    gap = mae["none"] - mae["full"]
    if np.any(gap <= 0):
        return math.nan, None
    return spread((mae["none"] - mae["missing"]) / gap)


def _findings(summary: SetSummary) -> list[tuple[bool, str]]:
    """What a reader would look for in the table, checked on the means over seeds."""
    mae = {(r.kind, r.condition): r.values["mae"][0] for r in summary.rows}
    found = []
    order = [c for c in ("full", "missing", "none") if ("model", c) in mae]
    if "missing" in order and "none" in order and not summary.test_set.conditions["missing"].simulated:
        order.remove("missing")  # the same as none
    if len(order) > 1:
        values = [mae["model", c] for c in order]
        holds = all(a < b for a, b in itertools.pairwise(values))
        found.append((holds, f"MAE {' < '.join(order)}: " + ", ".join(f"{v:.3f}" for v in values)))
    conditions = list(summary.test_set.shown)
    if ("median", "") in mae:
        worst = max(conditions, key=lambda c: mae["model", c])
        found.append(
            (
                mae["model", worst] < mae["median", ""],
                f"every condition beats the median of the train labels: at worst {mae['model', worst]:.3f} "
                f"({worst}) against {mae['median', '']:.3f}",
            )
        )
    for c in conditions:
        if ("ridge", c) in mae:
            holds = mae["model", c] < mae["ridge", c]
            found.append(
                (holds, f"{c} beats ridge on the same modalities: {mae['model', c]:.3f} against {mae['ridge', c]:.3f}")
            )
    return found


def _data(names: list[str], dumps: dict[str, Dump], data_root: Path, dump_root: Path) -> list[dict[str, str]]:
    rows = []
    for name in dict.fromkeys(names):
        row = {"set": name, "utterances": "–", "speakers": "–", "left out": "–", "reasons": ""}
        if name in dumps:
            row["utterances"] = str(len(dumps[name].utterances))
        for folder in (dump_root / name, data_root / name):
            if (folder / "utt2spk").is_file():
                row["speakers"] = str(len(set(read_table(folder / "utt2spk").values())))
                break
        if (data_root / name).is_dir() or (dump_root / name).is_dir():
            reasons: Counter[str] = Counter()
            for path in (data_root / name / "dropped.tsv", dump_root / name / "dropped.tsv"):
                if path.is_file():
                    reasons.update(f"{stage}, {reason}" for _, stage, reason in read_dropped(path))
            row["left out"] = str(sum(reasons.values()))
            row["reasons"] = "; ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items()))
        rows.append(row)
    return rows


def _quality(names: list[str], dump_root: Path) -> list[dict[str, str]]:
    """WER and what became of the simulated text, per set, from ``<name>.quality.json``."""
    rows = []
    for name in dict.fromkeys(names):
        simulated = _read_json(dump_root / name / "text_sim.quality.json")
        recognised = _read_json(dump_root / name / "text_asr.quality.json")
        if not simulated and not recognised:
            continue
        row = {"set": name, "utterances": str((simulated or recognised).get("n", "–"))}
        row["WER simulated"] = _per_cent(simulated.get("wer"))
        counts = simulated.get("counts") or {}
        for state in [*STATES, *sorted(set(counts) - set(STATES))]:
            row[state] = str(counts.get(state, "–"))
        row["fell back"] = _fallbacks(simulated)
        row["WER recogniser"] = _per_cent(recognised.get("wer"))
        rows.append(row)
    # Every row needs the same columns.
    columns = list(dict.fromkeys(c for row in rows for c in row if c not in ("fell back", "WER recogniser")))
    return [{c: row.get(c, "0") for c in [*columns, "fell back", "WER recogniser"]} for row in rows]


def _fallbacks(quality: dict) -> str:
    value = next((quality[k] for k in ("fallbacks", "fallback", "fallback_counts") if k in quality), None)
    if value is None:
        return "–"
    if isinstance(value, dict):
        total = sum(value.values())
        return f"{total} ({', '.join(f'{k}: {v}' for k, v in sorted(value.items()))})" if total else "0"
    return str(value)


def _per_cent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"


def _read_json(path: Path) -> dict:
    content = read_json(path, "run the stage that makes it again", absent={})
    return content if isinstance(content, dict) else {}


def _features(dump: Dump | None) -> list[dict[str, str]]:
    """One row per feature of the train set, from its ``<name>.yaml`` where that is there."""
    rows = []
    for name, feature in (dump.features if dump else {}).items():
        meta = feature.meta or {}
        frames = list(feature.frames.values())
        rows.append(
            {
                "feature": name,
                "dimension": str(feature.dim),
                "mean frames": f"{np.mean(frames):.1f}" if frames else "–",
                "frame rate (Hz)": _short(meta.get("frame_rate", meta.get("frame_rate_hz"))),
                "extractor": _short(meta.get("extractor")),
                "model": _short(meta.get("model")),
                "layers": _short(meta.get("layers", meta.get("layer"))),
                "absent": str(len(feature.absent)),
            }
        )
    return rows


def _short(value: object) -> str:
    """A value for a table cell; of an absolute path the last part, so that the report is the same elsewhere."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_short(v) for v in value)
    text = str(value)
    return Path(text).name if text.startswith("/") else text


def _settings(runs: list[Run]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Settings that all runs share, and those that differ (but for the seed and the folder, which must)."""
    flat = [_flatten(run.config) for run in runs]
    keys = sorted(set().union(*flat))
    shared, own = {}, {}
    for key in keys:
        values = [_short(f.get(key)) for f in flat]
        if key in ("seed", "exp_dir", "exp-dir", "config"):
            continue
        if len(set(values)) == 1:
            shared[key] = values[0]
        else:
            own[key] = values
    return shared, own


def _flatten(config: dict, prefix: str = "") -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            out.update(_flatten(value, f"{prefix}{key}."))
        else:
            out[f"{prefix}{key}"] = value
    return out


def _versions() -> dict[str, str]:
    versions = {"sdumc": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "numpy", "kaldiio"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions
