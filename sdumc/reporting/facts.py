"""Facts about data, texts, features, settings and packages, as rows of tables: a dictionary by column for each row."""

from __future__ import annotations

import importlib.metadata
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sdumc import __version__
from sdumc.conditions import TEXT_STATUSES
from sdumc.data.dropped import read_dropped
from sdumc.data.dump import Dump
from sdumc.data.tables import read_table
from sdumc.files import read_json
from sdumc.reporting.runs import Run

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
            counts = simulated.get("counts", {})
            rows.append(
                {
                    "set": name,
                    "utterances": str((simulated or recognised)["n"]),
                    "WER simulated": _per_cent(simulated.get("wer")),
                    **{status: str(counts.get(status, UNKNOWN)) for status in TEXT_STATUSES},
                    "fell back": _fallbacks(simulated["fallbacks"]) if simulated else UNKNOWN,
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
