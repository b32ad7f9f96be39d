"""What a report is about: training runs (settings, curves, size), decoded sets (predictions, scores, texts, media)."""

from __future__ import annotations

import json
import logging
import math
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from safetensors import SafetensorError, safe_open

from sdumc.conditions import (
    CONDITIONS,
    MAIN_CONDITIONS,
    MISSING_TEXTS,
    SIMULATED,
    TEXTS,
    Condition,
    by_condition,
    condition_of,
)
from sdumc.data.tables import read_table
from sdumc.errors import UserError
from sdumc.files import read_json, read_yaml
from sdumc.scale import CMU, LabelScale, from_dict
from sdumc.scoring.attention import read_attention
from sdumc.scoring.metrics import Predictions, read_predictions, score
from sdumc.training.settings import read_train_sets

log = logging.getLogger(__name__)

_RECORDED = ("seed", "train-dir", "valid-dir")  # settings that the report rests on


@dataclass
class Run:
    """One training run, i.e. one seed."""

    path: Path
    config: dict
    history: list[dict]  # one entry an epoch, as in metrics.jsonl
    parameters: int | None  # numbers in the saved model; None where it was removed
    chosen: list[int] = field(default_factory=list)  # epochs whose average the model is; of older runs not recorded
    train_sets: list[dict] = field(default_factory=list)  # where it learned from several folders: what it says of each

    @property
    def seed(self) -> str:
        return str(self.config["seed"])

    @property
    def missing_text(self) -> str:
        """What the missing flow reads: one of :data:`sdumc.conditions.MISSING_TEXTS`."""
        return str(self.config.get("missing-text", SIMULATED))

    def folder(self, key: str) -> Path:
        """The folder of the setting ``key``; of several to learn from, the first."""
        value = self.config[key]
        return Path(str(value[0] if isinstance(value, list) else value))

    def is_of(self, key: str, folder: Path) -> bool:
        """Whether ``folder`` may be what the setting ``key`` names; no, if that is another folder that is there."""
        recorded = self.folder(key)
        return not recorded.is_dir() or not folder.is_dir() or recorded.samefile(folder)

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
        UserError: a folder is not there, was not trained, two of them are the same seed, or their missing flows read
            different texts.
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
        chosen = read_yaml(path / "chosen.yaml")["epochs"] if (path / "chosen.yaml").is_file() else []
        run = Run(path, config, history, count_parameters(path), chosen, read_train_sets(path))
        for other in runs:
            if other.seed == run.seed:
                raise UserError(
                    f"{path} and {other.path} are both seed {run.seed}; a spread over seeds needs different ones"
                )
            if other.missing_text != run.missing_text:
                raise UserError(
                    f"{other.path} was trained with missing-text {other.missing_text}, {path} with {run.missing_text}: "
                    "means over both would mean nothing; compare them with `python -m sdumc.bin.compare`"
                )
        runs.append(run)
    return runs


def used_set(runs: Sequence[Run], key: str, given: str | None) -> str:
    """The name of the set that the runs were trained on (``key`` = train-dir) or chosen by (valid-dir).

    Raises:
        UserError: it is not the one given, or the runs do not agree.
    """
    recorded = {run.folder(key).name: run for run in runs}
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


_SOUND_ONLY = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac")


@dataclass
class ConditionResults:
    """What all R runs predict for the N utterances of one set under one condition."""

    name: str
    predictions: np.ndarray  # (R, N)
    scores: list[dict]  # R score.json, with NaN for null
    features: list[set[str]]  # of the dump, R times: what the model was given
    internals: list[dict[str, np.ndarray]]  # R internals.npz, rows in the order of the utterances
    # R attention.npz: utterance -> modality -> (7, T); empty where decoding kept none
    attention: list[dict[str, dict[str, np.ndarray]]]

    missing_text: str = SIMULATED  # what the runs' missing flow reads

    @property
    def condition(self) -> Condition | None:
        """What the folder's name stands for in these runs; None where it is no condition's name."""
        return condition_of(self.name, self.missing_text) if self.name in CONDITIONS else None

    @property
    def without_missing_text(self) -> bool:
        """Whether this is ``missing`` in a set without the text of the missing flow, scored as under ``none``."""
        text = MISSING_TEXTS[self.missing_text]
        return self.name == "missing" and not all(text in given for given in self.features)

    @property
    def text(self) -> str:
        """The text feature that the condition is about: one of :data:`sdumc.conditions.TEXTS`."""
        return (self.condition.text if self.condition else None) or "text"

    @property
    def meaning(self) -> str:
        """Which text it is, or what is left out, in two words; empty for a folder whose name is no condition."""
        if self.without_missing_text and self.missing_text != "none":
            return "no text (none was simulated)" if self.missing_text == SIMULATED else "no text (no ASR text)"
        return self.condition.short if self.condition else ""

    @property
    def title(self) -> str:
        return f"{self.name}: {self.meaning}" if self.meaning else self.name


@dataclass
class Media:
    """Where the sound or picture of an utterance is, as a link on the page."""

    href: str
    kind: str  # video or audio


class Tokeniser:
    """The tokenizer of a language model's folder, loaded when it is first asked for."""

    def __init__(self, model: str, root: Path):
        """``model`` is the folder as the features' settings name it, relative to the recipe's folder ``root``."""
        self._paths = [folder / model / "tokenizer.json" for folder in (Path(), root)]
        self._loaded = False
        self._tokenizer: Any = None

    def __call__(self, words: str, frames: int) -> list[str]:
        """A label per frame: the tokens of ``words``, or else its words; empty if neither has ``frames`` items."""
        if not self._loaded:
            self._loaded = True
            path = next((p for p in self._paths if p.is_file()), None)
            if path is not None:
                from tokenizers import Tokenizer

                try:
                    self._tokenizer = Tokenizer.from_file(str(path))
                except Exception as e:  # the package raises plain Exception; a missing label must not stop a report
                    log.warning("%s: cannot be read (%s): no tokens beside the attention", path, e)
        if self._tokenizer is not None:
            tokens = self._tokenizer.encode(words, add_special_tokens=False).tokens
            if len(tokens) == frames:
                return [token.replace("▁", "").replace("Ġ", "") or "·" for token in tokens]
        by_word = words.split()
        return by_word if len(by_word) == frames else []


@dataclass
class TestSet:
    """One decoded set: N utterances in sorted order."""

    __test__ = False  # not a test case, whatever pytest thinks of the name

    name: str
    utterances: list[str]
    labels: np.ndarray  # (N,)
    conditions: dict[str, ConditionResults]
    speakers: dict[str, str] = field(default_factory=dict)
    texts: dict[str, dict[str, str]] = field(default_factory=dict)  # text, text_sim, text_asr -> utterance -> words
    status: dict[str, str] = field(default_factory=dict)  # of the simulated text, by utterance: ok, empty, refusal ...
    media: dict[str, Media] = field(default_factory=dict)
    frame_rates: dict[str, float] = field(default_factory=dict)  # Hz, of audio and video
    tokenisers: dict[str, Tokeniser] = field(default_factory=dict)  # by text feature

    @property
    def scale(self) -> LabelScale:
        """That of labels and predictions, as the scores have it."""
        return next(iter(self.conditions.values())).scores[0].get("scale", CMU)

    @property
    def mapped_from(self) -> str:
        """The scales of models that were trained on another one; empty where all were trained on this one's."""
        found = {score.get("mapped_from") for c in self.conditions.values() for score in c.scores}
        return " and ".join(sorted(filter(None, found)))

    @property
    def shown(self) -> dict[str, ConditionResults]:
        """The conditions that figures show: the main ones, or all when none of those was decoded."""
        main = {name: c for name, c in self.conditions.items() if name in MAIN_CONDITIONS}
        return main or self.conditions


def collect_set(runs: Sequence[Run], name: str, data_root: Path, dump_root: Path, output_dir: Path) -> TestSet:
    """Read what every run decoded for the set ``name``, and the set's texts and media as far as they are there.

    Raises:
        UserError: a run or condition is not decoded or scored, a score is not that of the predictions, or the
            runs decoded different utterances.
    """
    data_dir, dump_dir = data_root / name, dump_root / name
    tables, conditions = _conditions(runs, name, dump_dir)
    result = TestSet(name, tables[0].ids, tables[0].labels, conditions)
    for folder in (dump_dir, data_dir):
        if not result.speakers and (folder / "utt2spk").is_file():
            result.speakers = read_table(folder / "utt2spk")
    for text in TEXTS:
        if (data_dir / text).is_file():
            # Real text always has words; a recogniser may have heard none.
            result.texts[text] = read_table(data_dir / text, allow_empty=True)
        if model := _settings(dump_dir, text).get("model"):
            result.tokenisers[text] = Tokeniser(str(model), dump_root.absolute().parent)
    for modality in ("audio", "video"):
        if rate := _settings(dump_dir, modality).get("frame_rate"):
            result.frame_rates[modality] = float(rate)
    if (dump_dir / "text_sim.status.tsv").is_file():
        result.status = read_status(dump_dir / "text_sim.status.tsv")
    result.media = media_links(data_dir, result.utterances, output_dir)
    return result


def _conditions(
    runs: Sequence[Run], name: str, dump_dir: Path
) -> tuple[list[Predictions], dict[str, ConditionResults]]:
    """All predictions of the set, which are about the same utterances, and the results by condition."""
    found = {run.path: {p.parent.name for p in (run.path / f"decode_{name}").glob("*/predictions.tsv")} for run in runs}
    names = sorted(set().union(*found.values()), key=by_condition)
    if not names:
        folder = runs[0].path / f"decode_{name}"
        raise UserError(f"{folder}: no condition was decoded; {_decode_advice(runs[0], dump_dir, folder / 'full')}")
    tables: list[Predictions] = []
    conditions: dict[str, ConditionResults] = {}
    for condition in names:
        results = ConditionResults(condition, np.zeros(0), [], [], [], [], runs[0].missing_text)
        for run in runs:
            folder = run.path / f"decode_{name}" / condition
            if condition not in found[run.path]:
                advice = _decode_advice(run, dump_dir, folder)
                raise UserError(f"{folder}: not decoded, though another seed is; {advice}")
            table = read_predictions(folder / "predictions.tsv")
            first = (tables or [table])[0]
            if table.ids != first.ids or not np.allclose(table.labels, first.labels, atol=1e-6):
                raise UserError(
                    f"{table.path} and {first.path} are not about the same utterances and labels; "
                    "decode all seeds and conditions again from the same data (stage 5)"
                )
            tables.append(table)
            results.scores.append(read_score(folder, table))
            first_scale = conditions[names[0]].scores[0]["scale"] if conditions else results.scores[0]["scale"]
            if results.scores[-1]["scale"] != first_scale:
                raise UserError(
                    f"{folder}/score.json: labels from {results.scores[-1]['scale'].ends}, elsewhere from "
                    f"{first_scale.ends}; decode and score all of them again (stage 5)"
                )
            features, internals = _read_internals(folder / "internals.npz", table.ids)
            results.features.append(features)
            results.internals.append(internals)
            results.attention.append(read_attention(folder))
        results.predictions = np.stack([table.predictions for table in tables[-len(runs) :]])
        conditions[condition] = results
    return tables, conditions


def _decode_advice(run: Run, dump_dir: Path, folder: Path) -> str:
    return (
        f"run `python -m sdumc.bin.decode --exp-dir {run.path} --data-dir {dump_dir} --condition {folder.name} "
        f"--output-dir {folder}` (stage 5)"
    )


def _settings(dump_dir: Path, feature: str) -> dict:
    """How a feature was made; empty where the dump does not say."""
    path = dump_dir / f"{feature}.yaml"
    return read_yaml(path) if path.is_file() else {}


def read_score(folder: Path, table: Predictions) -> dict:
    """``score.json`` of ``table``, refused when it is that of other predictions."""
    path = folder / "score.json"
    advice = f"run `python -m sdumc.bin.score --predictions {table.path} --output {path}` (stage 5)"
    content = read_json(path, advice)
    now = score(table.predictions, table.labels)
    try:
        content = {"ccc": now["ccc"], "scale": CMU.as_dict(), **content}  # files of earlier versions lack them
        scale = from_dict(content["scale"], path)
        measures: dict[str, Any] = {
            key: math.nan if content[key] is None else float(content[key]) for key in scale.measures
        }
        measures |= {"n": int(content["n"]), "rounding": content["rounding"], "notes": content["notes"]}
        measures |= {"scale": scale, "mapped_from": str(content.get("mapped_from", ""))}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: not a score file; {advice}") from None
    if measures["n"] != now["n"] or abs(measures["mae"] - now["mae"]) > 1e-6:
        raise UserError(f"{path}: not the score of {table.path} as it is now; {advice}")
    return measures


def _read_internals(path: Path, ids: list[str]) -> tuple[set[str], dict[str, np.ndarray]]:
    """The dump features that were read, and the arrays of ``internals.npz``."""
    advice = "decode this condition again (stage 5)"
    if not path.is_file():
        raise UserError(f"{path}: not there; {advice}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
        own, features = arrays.pop("ids").tolist(), set(str(arrays.pop("features")).split())
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: cannot be read ({e}); {advice}") from None
    if own != ids or any(len(a) != len(ids) for a in arrays.values()):
        raise UserError(f"{path}: not about the utterances of {path.with_name('predictions.tsv')}; {advice}")
    return features, arrays


def read_status(path: Path) -> dict[str, str]:
    """The status of each utterance in ``text_sim.status.tsv``."""
    header, *rows = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines())
    if header[:2] != ["utt_id", "status"] or any(len(row) < 2 for row in rows):
        raise UserError(f"{path}: not a table of utt_id, status, ...; run stage 2 again")
    return {row[0]: row[1] for row in rows}


def media_links(data_dir: Path, utterances: Sequence[str], output_dir: Path) -> dict[str, Media]:
    """Relative links from ``output_dir`` to the media of the utterances; those of a video where there is one."""
    tables = {}
    for name in ("video.scp", "wav.scp", "segments"):
        tables[name] = read_table(data_dir / name) if (data_dir / name).is_file() else {}
    links = {}
    for utt in utterances:
        recording, part = utt, ""
        if utt in tables["segments"]:
            try:
                recording, start, end = tables["segments"][utt].split()
                part = f"#t={float(start):g},{float(end):g}"  # a media fragment: browsers play this part only
            except ValueError:
                raise UserError(f"{data_dir / 'segments'}: utterance {utt}: expected recording, start, end") from None
        path = tables["video.scp"].get(recording) or tables["wav.scp"].get(recording)
        if path:
            relative = Path(os.path.relpath(os.path.abspath(path), os.path.abspath(output_dir))).as_posix()
            kind = "audio" if Path(path).suffix.lower() in _SOUND_ONLY else "video"
            links[utt] = Media(quote(relative) + part, kind)
    return links
