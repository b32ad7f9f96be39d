"""Gather what a report is made from: the runs, their predictions, the texts, and links to the media."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import numpy as np

from sdumc.data.tables import read_table
from sdumc.errors import UserError
from sdumc.files import read_json, read_yaml
from sdumc.reporting.tokens import Tokeniser
from sdumc.scoring.attention_file import read_attention
from sdumc.scoring.metrics import MEASURES, read_predictions, score

# In the order of tables and legends; conditions that others add follow in alphabetical order.
CONDITION_NAMES = {
    "full": "real text",
    "missing": "simulated text",
    "asr": "ASR text",
    "none": "no text",
    "audio": "nothing else",
    "text": "nothing else",
    "video": "nothing else",
    "audio+text": "no video",
    "audio+video": "no text",
    "text+video": "no audio",
}
CONDITIONS = tuple(CONDITION_NAMES)
MAIN_CONDITIONS = CONDITIONS[:4]
QUERY_NAMES = ("fused", "audio + text", "text + video", "audio + video", "audio", "text", "video")
MODALITY_NAMES = ("audio", "text", "video")


@dataclass
class Run:
    """One training run, i.e. one seed."""

    path: Path
    seed: str
    config: dict
    history: list[dict]  # one entry an epoch, as in metrics.jsonl
    parameters: int | None  # numbers in the saved model


@dataclass
class Condition:
    """What all R runs predict for the N utterances of one set under one condition."""

    name: str
    predictions: np.ndarray  # (R, N)
    scores: list[dict]  # R score.json, with NaN for null
    internals: list[dict[str, np.ndarray]]  # R times internals.npz, rows in the order of the utterances
    # R times attention.npz: utterance -> modality -> (7, T); empty where decoding kept none
    attention: list[dict[str, dict[str, np.ndarray]]] = field(default_factory=list)

    @property
    def is_main(self) -> bool:
        return self.name in MAIN_CONDITIONS

    @property
    def simulated(self) -> bool:
        """Whether simulated text was there for ``missing``; a set without any was scored as under ``none``."""
        return all("text_sim" in str(i.get("features", "text_sim")) for i in self.internals)

    @property
    def meaning(self) -> str:
        """What the condition gave in place of a text, or left out, in two words; empty for those of others."""
        if self.name == "missing" and not self.simulated:
            return "no text (none was simulated)"
        return CONDITION_NAMES.get(self.name, "")

    @property
    def title(self) -> str:
        return f"{self.name}: {self.meaning}" if self.meaning else self.name


@dataclass
class Media:
    """Where the sound or picture of an utterance is, seen from the page; times in seconds within the file."""

    href: str
    kind: str  # video or audio
    start: float = 0.0
    end: float | None = None


@dataclass
class TestSet:
    """One decoded set: N utterances in sorted order."""

    __test__ = False  # not a test case, whatever pytest thinks of the name

    name: str
    utterances: list[str]
    labels: np.ndarray  # (N,)
    conditions: dict[str, Condition]
    speakers: dict[str, str] = field(default_factory=dict)
    texts: dict[str, dict[str, str]] = field(default_factory=dict)  # text, text_sim, text_asr -> utterance -> words
    status: dict[str, str] = field(default_factory=dict)  # what became of the simulated text: ok, empty, refusal ...
    media: dict[str, Media] = field(default_factory=dict)
    frame_rates: dict[str, float] = field(default_factory=dict)  # Hz by feature
    tokenisers: dict[str, Tokeniser] = field(default_factory=dict)  # by text feature

    @property
    def shown(self) -> dict[str, Condition]:
        """The conditions that figures show: the four main ones, or whatever there is when none of them is."""
        main = {name: c for name, c in self.conditions.items() if c.is_main}
        return main or self.conditions


def collect_runs(exp_dirs: Sequence[str | Path]) -> list[Run]:
    """Read the settings and training curves of each run.

    Raises:
        UserError: a folder is not there, was not trained, or two of them are the same seed.
    """
    runs: list[Run] = []
    for path in map(Path, exp_dirs):
        if not path.is_dir():
            raise UserError(f"{path}: no such experiment folder; train it first (stage 4)")
        config = read_yaml(path / "config.yaml") if (path / "config.yaml").is_file() else {}
        named = re.search(r"seed(\d+)$", path.name)
        seed = str(config.get("seed", named.group(1) if named else path.name))
        for other in runs:
            if other.seed == seed:
                raise UserError(
                    f"{path} and {other.path} are both seed {seed}; a spread over seeds needs different ones"
                )
        runs.append(Run(path, seed, config, read_history(path / "metrics.jsonl"), count_parameters(path)))
    if not runs:
        raise UserError("--exp-dirs names no experiment folder")
    return runs


def used_set(runs: Sequence[Run], key: str, given: str | None, default: str) -> str:
    """The name of the set that the runs were trained on (``key`` = train-dir) or chosen by (valid-dir).

    Raises:
        UserError: it is not the one given, or the runs do not agree.
    """
    recorded = {Path(str(value)).name: run for run in runs if (value := run.config.get(key))}
    if len(recorded) > 1:
        raise UserError(
            f"--exp-dirs: the runs differ in {key}: {', '.join(f'{r.path} has {n}' for n, r in recorded.items())}; "
            "only runs that differ in their seed belong into one report"
        )
    for name, run in recorded.items():
        if given not in (None, name):
            raise UserError(f"{run.path}/config.yaml: {key} is {run.config[key]}, not the set {given} that was given")
        return name
    return given or default


def read_history(path: Path) -> list[dict]:
    """Read ``metrics.jsonl``, one object an epoch; of an epoch written twice by a resumed run the last counts."""
    epochs: dict[int, dict] = {}
    try:
        with open(path, encoding="utf-8") as f:
            for number, line in enumerate(f, start=1):
                try:
                    entry = json.loads(line)
                    epochs[int(entry["epoch"])] = entry
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{path}:{number}: not a JSON object with an epoch; train again (stage 4)"
                    ) from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); train this run first (stage 4)") from None
    if not epochs:
        raise UserError(f"{path}: no epoch was finished; go on with the training (stage 4)")
    return [epochs[e] for e in sorted(epochs)]


def count_parameters(exp_dir: Path) -> int | None:
    """How many numbers the saved model has, read from the header of its safetensors file; None if there is none."""
    for name in ("model.valid-best.safetensors", "model.averaged.safetensors"):
        path = exp_dir / name
        if not path.is_file():
            continue
        try:
            with open(path, "rb") as f:
                (size,) = struct.unpack("<Q", f.read(8))
                header = json.loads(f.read(size))
            return sum(math.prod(v["shape"]) for k, v in header.items() if k != "__metadata__")
        except (struct.error, ValueError, KeyError, TypeError, OverflowError, MemoryError):
            raise UserError(f"{path}: not a whole safetensors file; train this run again (stage 4)") from None
    return None


def collect_set(runs: Sequence[Run], name: str, data_root: Path, dump_root: Path, output_dir: Path) -> TestSet:
    """Read what every run decoded for the set ``name``, and the set's texts and media as far as they are there.

    Raises:
        UserError: a run or condition is not decoded or scored, a score is not that of the predictions, or the
            runs decoded different utterances.
    """
    found = {run.path: _condition_folders(run.path / f"decode_{name}") for run in runs}
    names = sorted(set().union(*found.values()), key=condition_order)
    if not names:
        raise UserError(
            f"{runs[0].path}/decode_{name}: no condition was decoded; run `python -m sdumc.bin.decode --exp-dir "
            f"{runs[0].path} --data-dir {dump_root / name} --condition full --output-dir "
            f"{runs[0].path}/decode_{name}/full` (stage 5)"
        )
    reference = None
    conditions = {}
    for condition in names:
        predictions, scores, internals, attention = [], [], [], []
        for run in runs:
            folder = run.path / f"decode_{name}" / condition
            if condition not in found[run.path]:
                raise UserError(
                    f"{folder}: not decoded, though another seed is; run `python -m sdumc.bin.decode --exp-dir "
                    f"{run.path} --data-dir {dump_root / name} --condition {condition} --output-dir {folder}` (stage 5)"
                )
            table = read_predictions(folder / "predictions.tsv")
            if reference is None:
                reference = table
            if table.ids != reference.ids or not np.allclose(table.labels, reference.labels, atol=1e-6):
                raise UserError(
                    f"{table.path} and {reference.path} are not about the same utterances and labels; "
                    "decode all seeds and conditions again from the same data (stage 5)"
                )
            predictions.append(table.predictions)
            scores.append(_read_score(folder, table))
            internals.append(_read_internals(folder / "internals.npz", table.ids))
            attention.append(read_attention(folder))
        conditions[condition] = Condition(condition, np.stack(predictions), scores, internals, attention)
    assert reference is not None

    data_dir, dump_dir = data_root / name, dump_root / name
    result = TestSet(name, reference.ids, reference.labels, conditions)
    for folder in (dump_dir, data_dir):
        if not result.speakers and (folder / "utt2spk").is_file():
            result.speakers = read_table(folder / "utt2spk")
    for kind in ("text", "text_sim", "text_asr"):
        if (data_dir / kind).is_file():
            # In a data directory every utterance has words; a recogniser may have heard none.
            result.texts[kind] = read_table(data_dir / kind, allow_empty=True)
    if (dump_dir / "text_sim.status.tsv").is_file():
        result.status = read_status(dump_dir / "text_sim.status.tsv")
    for feature in ("audio", "video", "text", "text_sim", "text_asr"):
        meta = read_yaml(path) if (path := dump_dir / f"{feature}.yaml").is_file() else {}
        if not feature.startswith("text"):
            rate = meta.get("frame_rate")
            if isinstance(rate, (int, float)) and rate > 0:
                result.frame_rates[feature] = float(rate)
        elif meta.get("model"):
            result.tokenisers[feature] = Tokeniser(str(meta["model"]), dump_root.absolute().parent)
    result.media = media_links(data_dir, result.utterances, output_dir)
    return result


def condition_order(name: str) -> tuple[int, str]:
    return (CONDITIONS.index(name), "") if name in CONDITIONS else (len(CONDITIONS), name)


def _condition_folders(folder: Path) -> set[str]:
    return {p.parent.name for p in folder.glob("*/predictions.tsv")}


def _read_score(folder: Path, table) -> dict:
    """``score.json`` of ``table``, refused when it is that of other predictions."""
    path = folder / "score.json"
    advice = f"run `python -m sdumc.bin.score --predictions {table.path} --output {path}` (stage 5)"
    content = read_json(path, advice)
    try:
        measures = {key: math.nan if content[key] is None else float(content[key]) for key in MEASURES}
        measures["n"] = int(content["n"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: not a score file; {advice}") from None
    measures["rounding"] = content.get("rounding", "half-even")
    measures["notes"] = content.get("notes", [])
    now = score(table.predictions, table.labels)
    if measures["n"] != now["n"] or abs(measures["mae"] - now["mae"]) > 1e-6:
        raise UserError(f"{path}: not the score of {table.path} as it is now; {advice}")
    return measures


def _read_internals(path: Path, ids: list[str]) -> dict[str, np.ndarray]:
    advice = "decode this condition again (stage 5)"
    if not path.is_file():
        raise UserError(f"{path}: not there; {advice}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: cannot be read ({e}); {advice}") from None
    if "ids" not in arrays or sorted(arrays["ids"].tolist()) != ids:
        raise UserError(f"{path}: not about the utterances of {path.with_name('predictions.tsv')}; {advice}")
    order = np.argsort(arrays.pop("ids"))
    features = {"features": arrays.pop("features")} if "features" in arrays else {}
    return features | {key: value[order] for key, value in arrays.items() if value.ndim and len(value) == len(order)}


def read_status(path: Path) -> dict[str, str]:
    """``text_sim.status.tsv``: the column called ``status``, or the second one, by utterance."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not rows:
        return {}
    column = rows[0].index("status") if "status" in rows[0] else 1
    return {row[0]: row[column] for row in rows if len(row) > column and row[column] != "status"}


def media_links(data_dir: Path, utterances: Sequence[str], output_dir: Path) -> dict[str, Media]:
    """Relative links from ``output_dir`` to the media of the utterances; those of a video where there is one."""
    tables = {}
    for name in ("video.scp", "wav.scp", "segments"):
        tables[name] = read_table(data_dir / name) if (data_dir / name).is_file() else {}
    links = {}
    for utt in utterances:
        recording, start, end = utt, 0.0, None
        if utt in tables["segments"]:
            fields = tables["segments"][utt].split()
            try:
                recording, start, end = fields[0], float(fields[1]), float(fields[2])
            except (ValueError, IndexError):
                raise UserError(f"{data_dir / 'segments'}: utterance {utt}: expected recording, start, end") from None
        path = tables["video.scp"].get(recording) or tables["wav.scp"].get(recording)
        if not path:
            continue
        sound_only = Path(path).suffix.lower() in (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac")
        relative = Path(os.path.relpath(os.path.abspath(path), os.path.abspath(output_dir))).as_posix()
        href = quote(relative)
        if end is not None:
            href += f"#t={start:g},{end:g}"  # a media fragment: browsers play this part only
        links[utt] = Media(href, "audio" if sound_only else "video", start, end)
    return links
