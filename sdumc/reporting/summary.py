"""The numbers and words of a report, computed once for RESULTS.md and for the page.

Facts about data, texts, features, settings and packages are rows of tables: a dictionary by column for each row.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sdumc import __version__
from sdumc.conditions import MODALITIES, TEXT_STATUSES
from sdumc.data.dump import Dump, load_dump
from sdumc.data.tables import read_dropped, read_table
from sdumc.errors import UserError
from sdumc.files import read_json
from sdumc.reporting.protocols import ProtocolTable, protocol_tables
from sdumc.reporting.scores import SetSummary, fit_ridges, summarise_set
from sdumc.reporting.sets import Run, TestSet
from sdumc.scale import mapping_in_words
from sdumc.scoring.metrics import doubts, median_mae
from sdumc.training.settings import shares_in_words

UNKNOWN = "–"


def data_rows(
    names: Sequence[str], dumps: Mapping[str, Dump], data_root: Path, dump_root: Path
) -> list[dict[str, str]]:
    """Utterances, speakers and what was left out, a row a set."""
    rows = []
    for name in names:
        folders = (dump_root / name, data_root / name)
        row = {"set": name, "utterances": UNKNOWN, "speakers": UNKNOWN, "left out": UNKNOWN, "reasons": ""}
        if name in dumps:
            row["utterances"] = str(len(dumps[name].utterances))
        for folder in folders:
            if (folder / "utt2spk").is_file():
                row["speakers"] = str(len(set(read_table(folder / "utt2spk").values())))
                break
        if any(folder.is_dir() for folder in folders):
            lists = [folder / "dropped.tsv" for folder in folders]
            dropped = [entry for path in lists if path.is_file() for entry in read_dropped(path)]
            reasons = Counter(f"{stage}, {reason}" for _, stage, reason in dropped)
            row["left out"] = str(len(dropped))
            row["reasons"] = "; ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items()))
        rows.append(row)
    return rows


def quality_rows(names: Sequence[str], dump_root: Path) -> list[dict[str, str]]:
    """Word error rates, and what became of the simulated text, a row a set that has such text.

    From ``text_sim.quality.json`` and ``text_asr.quality.json``, which stage 2 writes.
    """
    rows = []
    for name in names:
        simulated, recognised = (
            read_json(dump_root / name / f"{text}.quality.json", "run stage 2 again", absent={})
            for text in ("text_sim", "text_asr")
        )
        if simulated or recognised:
            shown = simulated or recognised  # where none is simulated, the missing flow may read recognised text
            counts = shown.get("counts", {})
            rows.append(
                {
                    "set": name,
                    "utterances": str(shown["n"]),
                    "WER simulated": _per_cent(simulated.get("wer")),
                    **{status: str(counts.get(status, UNKNOWN)) for status in TEXT_STATUSES},
                    "fell back": _fallbacks(shown.get("fallbacks", {})),
                    "WER recogniser": _per_cent(recognised.get("wer")),
                }
            )
    return rows


def _fallbacks(counts: Mapping[str, int]) -> str:
    kinds = ", ".join(f"{kind}: {count}" for kind, count in sorted(counts.items()))
    return f"{sum(counts.values())} ({kinds})" if kinds else "0"


def _per_cent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{100 * value:.1f}%"


def feature_rows(dump: Dump | None) -> list[dict[str, str]]:
    """One row per feature of a set, with what its ``<name>.yaml`` says where that is there."""
    return [
        {
            "feature": name,
            "dimension": str(feature.dim),
            "mean frames": f"{np.mean(list(feature.frames.values())):.1f}" if feature.frames else UNKNOWN,
            "frame rate (Hz)": _cell(feature.meta.get("frame_rate")),
            "extractor": _cell(feature.meta.get("extractor")),
            "model": _cell(feature.meta.get("model")),
            "layers": _cell(feature.meta.get("layers")),
            "absent": str(len(feature.absent)),
        }
        for name, feature in (dump.features if dump else {}).items()
    ]


def _cell(value: object) -> str:
    """A value for a table cell; of an absolute path the last part, so that the report is the same elsewhere."""
    if value is None or value == "":
        return UNKNOWN
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(v) for v in value)
    text = str(value)
    return Path(text).name if text.startswith("/") else text


def settings(runs: Sequence[Run]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Settings that all runs share, and those that differ; without the seed and the folder, which must differ."""
    shared, own = {}, {}
    for key in sorted(set().union(*(run.config for run in runs)) - {"seed", "exp-dir"}):
        values = [_cell(run.config.get(key)) for run in runs]
        if len(set(values)) == 1:
            shared[key] = values[0]
        else:
            own[key] = values
    return shared, own


def versions() -> dict[str, str]:
    """Of this package, Python and the packages that numbers may depend on."""
    found = {"sdumc": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "numpy", "kaldiio"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


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
    protocols: dict[str, list[ProtocolTable]] = field(default_factory=dict)  # by set

    @property
    def seeds(self) -> str:
        names = ", ".join(run.seed for run in self.runs)
        return f"seed {names}" if len(self.runs) == 1 else f"{len(self.runs)} seeds ({names})"

    @property
    def trained(self) -> str:
        """Which flows were trained, on which modalities, and with which terms of the objective."""
        config, terms = self.runs[0].config, [t for t in self.runs[0].history[-1]["train"] if t != "loss"]
        flows = str(config.get("flows", "both"))
        who = "Both flows were" if flows == "both" else f"The {flows} flow alone was"
        on = [m for m in MODALITIES if config.get(f"{m}-dim", 1)]
        return f"{who} trained, on {', '.join(on)}; terms of the objective: {', '.join(terms)}."

    @property
    def parameters(self) -> str:
        counts = sorted({f"{run.parameters:,}" for run in self.runs if run.parameters is not None})
        return " / ".join(counts) if counts else "unknown"

    @property
    def chosen_epochs(self) -> list[str]:
        """By seed, such as ``12``; of an average of epochs ``9+12+14``."""
        return ["+".join(map(str, run.chosen or [run.best_epoch])) for run in self.runs]


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
    ridges, notes = fit_ridges(dumps, train_set, valid_set, dump_root, runs[0].missing_text)
    sets = [summarise_set(s, runs, ridges, dumps.get(train_set)) for s in test_sets]
    for part in sets:
        if theirs := part.test_set.mapped_from:
            said = mapping_in_words(theirs, part.test_set.scale)
            part.notes.insert(0, f"{said[0].upper()}{said[1:]}.")
        if part.test_set.name in (train_set, valid_set):
            use = "trained on" if part.test_set.name == train_set else "used to choose the epoch and the penalties"
            part.notes.insert(0, f"This set was {use}: its scores say little about other data.")
    if not any(run.parameters for run in runs):
        notes.append("No saved model in the experiment folders: the number of parameters is unknown.")
    notes += learned_from(runs, dump_root, train_set)
    ours = all(run.is_of("train-dir", dump_root / train_set) for run in runs)  # else the median is of other labels
    notes += doubts_of(runs, dumps.get(train_set) if ours else None, dumps.get(valid_set))
    shared, own = settings(runs)
    quality = quality_rows(names, dump_root)
    if not quality:
        notes.append(f"No text was simulated or recognised for {dump_root} (stage 2): there is no quality to state.")
    return Summary(
        title=title,
        runs=runs,
        train_set=train_set,
        valid_set=valid_set,
        sets=sets,
        data=data_rows(names, dumps, data_root, dump_root),
        quality=quality,
        features=feature_rows(dumps.get(train_set)),
        settings=shared,
        own_settings=own,
        versions=versions(),
        notes=notes,
        protocols={s.name: protocol_tables(runs, s) for s in test_sets},
    )


def learned_from(runs: Sequence[Run], dump_root: Path, train_set: str) -> list[str]:
    """What is to be said where runs learned from several folders, or from another one than the report's."""
    notes, here = [], dump_root / train_set
    if sets := runs[0].train_sets:
        notes += [f"The runs {line}." for line in shares_in_words(sets)]
    if not all(run.is_of("train-dir", here) for run in runs):
        notes.append(f"The runs were trained on {runs[0].folder('train-dir')}, not on {here}.")
    if notes:
        notes.append(f"Ridge regression and the median are of {here} alone.")
    return notes


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
