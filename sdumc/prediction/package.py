"""A trained model and all it needs to score a clip, as one folder or archive that works on another machine.

A packed folder holds ``model.safetensors``, ``config.yaml``, ``extractors.yaml`` with paths that count from the folder,
``models/`` with the pretrained models (or none, when they are named by their hub names), ``scores.json`` and
``README.md``, a model card: what the model is, how good it was measured to be, and how to use it.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from sdumc import __version__
from sdumc.conditions import CONDITIONS, SIMULATED, by_condition, condition_of, modality
from sdumc.errors import UserError
from sdumc.files import atomic_write, read_json, read_yaml, write_text
from sdumc.prediction.extractors import ModelUse, Record, find_model, load_record
from sdumc.scale import CMU, SCALE, LabelScale, from_dict, scale_of
from sdumc.scoring.metrics import format_measure
from sdumc.training.checkpoint import PACKED, RECORD, hub_pack, is_archive, weights_file
from sdumc.training.settings import CONFIG, read_train_sets, shares_in_words

_LEFT_OUT = ("ccc", "acc5", "acc3", "acc2_has0", "f1_has0")  # of the card's table, on CMU's scale
_ROLES = {
    "audio": "audio features",
    "encoder": "encodes the sound for the language model",
    "projector": "from the encoder's frames to the language model's inputs",
    "llm": "reads text, and simulates it where the model was trained so",
    "asr": "recognises speech",
    "vision": "video features",
}


_WITHOUT_TRANSCRIPT = {
    SIMULATED: "text is simulated from the sound",
    "asr": "a speech recogniser writes one",
    "none": "it does without",
}


def _reads(features: Mapping[str, Mapping[str, Any]], missing_text: str) -> str:
    """Which modalities a model reads, in words."""
    read = {modality(name) for name in features}
    names = [words for m, words in (("audio", "sound"), ("text", "words"), ("video", "pictures")) if m in read]
    if names == ["words"]:
        return "from its words. It needs a transcript."
    without = f" Without a transcript, {_WITHOUT_TRANSCRIPT[missing_text]}." if "words" in names else ""
    absent = " Absent modalities are left out." if len(names) > 1 else ""
    *first, last = (f"its {name}" for name in names)
    both = f"{', '.join(first)} and {last}" if first else last
    return f"from {both}.{without}{absent}"


def model_card(
    name: str,
    experiment: str,
    checkpoint: str,
    config: Mapping[str, Any],
    features: Mapping[str, Mapping[str, Any]],
    models: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]],
    backbones: bool,
    scale: LabelScale = CMU,
    train_sets: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The text of the card.

    Args:
        models: ``name`` in the pack, or on the hub; ``was``, ``roles`` and ``bytes``.
        scores: contents of score.json by set and condition.
        train_sets: of a model that learned from several corpora, as in ``train_sets.yaml``.
    """
    chosen = (
        "the epochs that are best on the valid set" if checkpoint == "valid-best" else "the mean of the best epochs"
    )
    missing_text = str(config.get("missing-text", SIMULATED))
    needs = "Everything that it needs is in this folder." if backbones else _fetching(models)
    parts = [
        "---\n" + yaml.safe_dump(_front_matter(name, scores), sort_keys=False) + "---\n",
        f"# {name}\n",
        f"SDUMC: the sentiment of an utterance as one number from {scale.named_ends}, "
        f"{_reads(features, missing_text)}\n",
        *(["".join(f"It {line}.\n" for line in shares_in_words(train_sets))] if train_sets else []),
        f"Experiment `{experiment}`, {chosen}. Made with sdumc {__version__}.\n",
        "## Use\n",
        f"{needs} Install sdumc, then, in the folder that holds this one:\n",
        f"```\nsdumc predict --exp-dir {name} clip.mp4\n```\n",
        f'```python\nfrom sdumc import Scorer\nscorer = Scorer.load("{name}")\n'
        'print(scorer.score("clip.mp4").overall)\n```\n',
        f"From the hub, fetch it once (`hf download OWNER/{name}`, with the owner's name), and give `OWNER/{name}` in "
        f"place of `{name}`. No network is needed then.\n",
        "## Measured scores\n",
        _score_table(scores, missing_text),
        "## Models inside\n" if backbones else "## Models that it works with\n",
        _model_table(models),
        "The pretrained models have licences of their own.\n",
        "## How features are made\n",
        _feature_list(features),
        f"The network's settings are in `config.yaml` (seed {config.get('seed', '?')}), the extractors' in "
        "`extractors.yaml`.\n",
        "## Limits\n",
        "Scores are meant for single utterances of speech like those of the train set: its language, its kind of "
        "speakers and recordings. A score is an estimate of what annotators would have said, not of what a speaker "
        "feels, and says nothing reliable about a single person.\n",
    ]
    return "\n".join(parts)


def _front_matter(name: str, scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    front: dict[str, Any] = {
        "library_name": "sdumc",
        "tags": ["multimodal-sentiment-analysis", "sdumc"],
    }
    results = []
    for test_set, conditions in scores.items():
        metrics = [
            {"type": m, "name": f"{title}, {condition}", "value": round(float(values[m]), 4)}
            for condition, values in conditions.items()
            for m, title in _shown(values).items()
            if values[m] is not None
        ]
        results.append(
            {
                "task": {"type": "multimodal-sentiment-analysis", "name": "Multimodal sentiment analysis"},
                "dataset": {"type": test_set, "name": test_set},
                "metrics": metrics,
            }
        )
    if results:
        front["model-index"] = [{"name": name, "results": results}]
    return front


def _score_table(scores: Mapping[str, Mapping[str, Mapping[str, Any]]], missing_text: str) -> str:
    if not scores:
        return "None were measured with this checkpoint.\n"
    from sdumc.reporting.report import markdown_table  # loads matplotlib, which reading a pack does not need

    shown = _shown(next(iter(next(iter(scores.values())).values())))
    rows = [
        (
            test_set,
            condition,
            condition_of(condition, missing_text).given if condition in CONDITIONS else "",
            conditions[condition]["n"],
            *(_cell(conditions[condition], m) for m in shown),
        )
        for test_set, conditions in scores.items()
        for condition in sorted(conditions, key=by_condition)
    ]
    table = markdown_table(("set", "condition", "it reads", "n", *shown.values()), rows, left=3)
    note = (
        "`missing` is what a clip without a transcript gets, `full` one with. Accuracies and F1 in per cent. In "
        "brackets, where they were computed, 95% intervals.\n"
    )
    return f"{table}\n\n{note}"


def _shown(scores: Mapping[str, Any]) -> dict[str, str]:
    """The measures of the card, by key: title. Scores of earlier versions are on CMU's scale."""
    scale = from_dict(scores.get("scale", CMU.as_dict()), SCORES)
    return {m: t for m, t in scale.measures.items() if scale.scheme != "cmu" or m not in _LEFT_OUT}


def _cell(scores: Mapping[str, Any], measure: str) -> str:
    """A measure with its interval; scores of earlier versions have none."""
    value, interval = scores[measure], scores.get("intervals", {}).get(measure)
    return format_measure(measure, math.nan if value is None else value, interval=interval)


def _model_table(models: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            f"`{m['name']}`",
            ", ".join(_ROLES[r] for r in m["roles"]),
            f"{m['bytes'] / 1e6:.1f} MB" if m["bytes"] else "not packed",
        )
        for m in models
    ]
    from sdumc.reporting.report import markdown_table

    return markdown_table(("model", "for", "size"), rows, left=2) + "\n"


def _fetching(models: Sequence[Mapping[str, Any]]) -> str:
    names = [m["name"] for m in models if not m["bytes"]]
    commands = "\n".join(f"hf download {n}" for n in names)
    return (
        "The large pretrained models are not in this folder. Fetch them into the hub's cache first, or have their "
        f"folders in one place and name that with `--model-dir`:\n\n```\n{commands}\n```\n\n"
    )


def _feature_list(features: Mapping[str, Mapping[str, Any]]) -> str:
    keys = (
        "layers",
        "frame_rate",
        "pooling",
        "detector",
        "context",
        "prompt",
        "prompt_template",
        "beam",
        "rescore_weight",
        "first_state",
        "dtype",
        "dim",
    )
    lines = []
    for name in sorted(features):
        said = [f"{k} {features[name][k]!r}" for k in keys if features[name].get(k) is not None]
        lines.append(f"* {name}: {', '.join(said)}")
    return "\n".join(lines) + "\n"


SCORES = "scores.json"
_WEIGHTS = (".bin", ".safetensors", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".ot", ".gguf")
_OF_THIS_MACHINE = ("train-dir", "train-weights", "valid-dir", "exp-dir", "init", "device", "num-workers", "save-every")


# ------------------------------------------------------------------------------------------------------------ opening


def open_experiment(path: Path) -> tuple[Path, Any]:
    """An exp folder, packed folder or packed archive as a folder, and what must be kept alive while it is used.

    An archive is unpacked into a temporary folder; unpack large ones by hand, once. ``OWNER/NAME``, if it is no folder,
    is a pack in the hub's cache; nothing is fetched.

    Raises:
        UserError: there is no such folder or archive, or the archive is damaged or none of ours; the hub's cache does
            not have the model, or not all of it.
    """
    if path.is_dir():
        return path, None
    if not path.exists() and (pack := hub_pack(str(path))):
        return open_experiment(pack)
    if not path.is_file():
        raise UserError(f"{path}: no such experiment folder, packed folder or archive")
    keep = tempfile.TemporaryDirectory(prefix="sdumc-")
    try:
        _unpack(path, Path(keep.name))
    except (tarfile.TarError, EOFError, OSError) as e:
        keep.cleanup()
        raise UserError(f"{path}: cannot be unpacked ({e}); is it an archive of `sdumc pack`, and whole?") from None
    except BaseException:
        keep.cleanup()
        raise
    folders = [p.parent for p in sorted(Path(keep.name).rglob(RECORD), key=lambda p: len(p.parts))]
    if not folders:
        keep.cleanup()
        raise UserError(f"{path}: no {RECORD} in it; is it an archive of `sdumc pack`?")
    return folders[0], keep


def _without_places(train_sets: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The train sets with the ends of their folders' names: two parts, or as many as tell them apart."""
    parts = [Path(part["folder"]).absolute().parts[1:] for part in train_sets]
    count = 2
    while len({p[-count:] for p in parts}) < len({*parts}):
        count += 1
    return [{**part, "folder": "/".join(p[-count:])} for part, p in zip(train_sets, parts, strict=True)]


def _unpack(path: Path, folder: Path) -> None:
    """Unpack plain files only, below ``folder``: an archive from elsewhere must not write to other places."""
    with tarfile.open(path) as archive:
        for member in archive:
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts or not (member.isfile() or member.isdir()):
                raise UserError(f"{path}: {member.name!r} is no plain file inside the archive; it was not made by pack")
            if member.isfile():
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                content = archive.extractfile(member)
                assert content is not None
                with content, open(target, "wb") as f:
                    shutil.copyfileobj(content, f, 2**22)


# ------------------------------------------------------------------------------------------------------------ packing


@dataclass
class _Models:
    """Pretrained models on their way into a pack: each once, under ``models/``."""

    record: Record
    model_dir: Path | None
    hub_names: Mapping[str, str] | None  # by folder name; None: the models themselves are packed

    def collect(self) -> tuple[dict[str, Path], list[dict[str, Any]]]:
        """Rewrite the record's paths. Returns the files by their name in the pack, and each model's row of the card."""
        files: dict[str, Path] = {}
        named: dict[Path, str] = {}
        rows: dict[Path, dict[str, Any]] = {}
        for use in self.record.models():
            place = find_model(use, self.record.folder, self.model_dir).resolve()
            if place not in named:
                named[place] = self._name(use, place, set(named.values()))
                size = 0
                if named[place].startswith("models/"):
                    for inner, source in _model_files(place, use.role):
                        files[f"{named[place]}/{inner}"] = source
                        size += source.stat().st_size
                rows[place] = {"name": named[place], "was": Path(use.name).name, "roles": [], "bytes": size}
            if use.role not in rows[place]["roles"]:
                rows[place]["roles"].append(use.role)
            use.settings[use.key] = named[place]
        return files, list(rows.values())

    def _name(self, use: ModelUse, place: Path, taken: set[str]) -> str:
        if self.hub_names is not None and use.role != "projector":
            return self._hub_name(use, place)
        base = "models/projector" if use.role == "projector" else f"models/{place.name}"
        name, number = base, 1
        while name in taken:
            number += 1
            name = f"{base}-{number}"
        return name

    def _hub_name(self, use: ModelUse, place: Path) -> str:
        assert self.hub_names is not None
        if place.name in self.hub_names:
            return self.hub_names[place.name]
        if any(part.startswith("models--") for part in place.parts):  # found in the hub's cache under its name
            return use.name
        raise UserError(
            f"{place}: its name on the hub is not known; give it: --hub-names {place.name}=OWNER/NAME "
            "(or pack the models too, without --no-backbones)"
        )


def _model_files(place: Path, role: str) -> Iterator[tuple[str, Path]]:
    """The needed files of a model: its weights in the format that is read, and all small files beside them."""
    from sdumc.pretrained.loading import weight_files
    from sdumc.pretrained.projector import projector_file

    if role == "projector":
        file = projector_file(place)
        yield file.name, file
        return
    weights = weight_files(place)
    for path in sorted(p for p in place.rglob("*") if p.is_file()):
        inner = path.relative_to(place)
        if any(part.startswith(".") for part in inner.parts) or inner.parts[0] in ("onnx", "runs"):
            continue
        if path in weights or not path.name.endswith(_WEIGHTS):
            yield inner.as_posix(), path


def pack(
    exp_dir: Path,
    output: Path,
    *,
    checkpoint: str = "valid-best",
    backbones: bool = True,
    hub_names: Mapping[str, str] | None = None,
    model_dir: Path | None = None,
) -> None:
    """Write a packed folder, or an archive if ``output`` ends in .tar, .tar.gz or .tgz.

    Args:
        checkpoint: ``valid-best`` or ``averaged``. Measured scores are those of ``decode_*/``, which stage 5 makes with
            valid-best; with ``averaged`` they are left out.
        backbones: pack the pretrained models; else name them by their hub names. The projector is always packed.
        hub_names: hub name by model folder name, where the folder does not know it.
        model_dir: a further place to look for models.

    Raises:
        UserError: something is missing, ``output`` is there already, or a hub name is not known.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output}: is there already; give another name or remove it")
    weights = weights_file(exp_dir, checkpoint)
    if not weights.is_file():
        raise UserError(f"{weights}: no such file; is {exp_dir} a folder that training (stage 4) wrote?")
    record = load_record(exp_dir)
    files, models = _Models(record, model_dir, None if backbones else (hub_names or {})).collect()
    files[PACKED] = weights
    scores = measured_scores(exp_dir) if checkpoint == "valid-best" else {}
    config = {k: v for k, v in read_yaml(exp_dir / CONFIG).items() if k not in _OF_THIS_MACHINE}
    scale = scale_of(exp_dir)
    name = output.name.split(".tar")[0].removesuffix(".tgz")
    texts = {
        CONFIG: yaml.safe_dump(config, sort_keys=True),
        SCALE: yaml.safe_dump(scale.as_dict(), sort_keys=False, allow_unicode=True),
        RECORD: yaml.safe_dump(record.features, sort_keys=True, allow_unicode=True),
        SCORES: json.dumps(scores, indent=2) + "\n",
        "README.md": model_card(
            *(name, exp_dir.name, checkpoint, config, record.features, models, scores, backbones, scale),
            _without_places(read_train_sets(exp_dir)),
        ),
    }
    (_write_archive if is_archive(output) else _write_folder)(output, name, files, texts)


def measured_scores(exp_dir: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Scores by set and condition, from ``decode_<set>/<condition>/score.json``, or from a pack's ``scores.json``."""
    if (exp_dir / SCORES).is_file():
        return _json(exp_dir / SCORES)
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(exp_dir.glob("decode_*/*/score.json")):
        values = _json(path)
        scores.setdefault(path.parent.parent.name.removeprefix("decode_"), {})[path.parent.name] = values
    return scores


def _json(path: Path) -> dict[str, Any]:
    return read_json(path, "make it again with stage 5, or remove it")


def _write_folder(output: Path, name: str, files: Mapping[str, Path], texts: Mapping[str, str]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        for inner, source in files.items():
            target = partial / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        for inner, text in texts.items():
            write_text(partial / inner, text)
        partial.chmod(0o755)
        if output.is_dir():
            output.rmdir()
        os.replace(partial, output)
    except OSError as e:
        raise UserError(f"{output}: cannot be written ({e.strerror})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_archive(output: Path, name: str, files: Mapping[str, Path], texts: Mapping[str, str]) -> None:
    """Write the archive directly from the files, without a copy. The same content gives the same bytes."""
    mode: Literal["w", "w:gz"] = "w" if output.name.endswith(".tar") else "w:gz"
    contents: dict[str, Path | bytes] = {**files, **{k: v.encode() for k, v in texts.items()}}
    try:
        with atomic_write(output, "wb") as f, tarfile.open(fileobj=f, mode=mode) as archive:
            # Small files first: listing or reading them does not need the models behind them.
            for inner in sorted(contents, key=lambda k: (k.startswith("models/"), k)):
                content = contents[inner]
                member = tarfile.TarInfo(f"{name}/{inner}")
                member.mode = 0o644
                if isinstance(content, bytes):
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                else:
                    member.size = content.stat().st_size
                    with open(content, "rb") as g:
                        archive.addfile(member, g)
    except OSError as e:
        raise UserError(f"{output}: cannot be written ({e.strerror})") from None
