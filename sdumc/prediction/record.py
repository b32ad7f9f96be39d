"""How an experiment's features were made (``extractors.yaml``), and where the models named there are now.

Training copies the record from ``dump/<train set>/<feature>.yaml``. It has the models' paths as they were given to the
extraction commands, usually relative to the recipe's folder. A model counts as found only if its weights are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from sdumc.errors import UserError
from sdumc.files import read_yaml

RECORD = "extractors.yaml"
# By feature: the settings that name a model, each with the role of the model.
_MODELS = {
    "audio": (("model", "audio"),),
    "text": (("encoder", "encoder"), ("projector", "projector"), ("model", "llm")),
    "text_sim": (("encoder", "encoder"), ("projector", "projector"), ("model", "llm")),
    "asr": (("model", "asr"),),
    "video": (("model", "vision"),),
}
# By feature: the settings without which a new clip cannot be treated in the same way.
_NEEDED = {
    "audio": ("model", "layers", "normalise", "dtype"),
    "text": ("model", "layers", "first_state", "prompt", "context", "dtype"),
    "text_sim": ("encoder", "projector", "model", "layers", "first_state", "prompt", "beam", "max_new_tokens", "dtype"),
    "video": ("model", "pooling", "frame_rate", "detector", "face_margin", "min_face", "dtype"),
}


@dataclass
class ModelUse:
    """A place of the record that names a model: ``settings[key]``; ``role`` says what the model is for."""

    settings: dict[str, Any]
    key: str
    role: str

    @property
    def name(self) -> str:
        """The model as recorded: a path, or its name on the hub."""
        return str(self.settings[self.key])

    @property
    def hash(self) -> str | None:
        """The fingerprint of its weights when the features were made."""
        return self.settings.get(f"{self.key}_hash")


@dataclass
class Record:
    """The settings of each feature's extractor, by feature: audio, text, text_sim, video.

    ``left_out`` has the reason for each feature whose extractor is not known.
    """

    folder: Path
    features: dict[str, dict[str, Any]]
    left_out: dict[str, str] = field(default_factory=dict)

    def models(self) -> Iterator[ModelUse]:
        """Every use of a model, the recogniser's (inside ``text_sim``) included."""
        for name, settings in self.features.items():
            parts = [(name, settings)]
            if isinstance(settings.get("asr"), dict):
                parts.append(("asr", settings["asr"]))
            for part, values in parts:
                for key, role in _MODELS[part]:
                    if values.get(key):
                        yield ModelUse(values, key, role)


def load_record(folder: Path) -> Record:
    """Read ``extractors.yaml`` of an exp folder or of a packed model.

    Raises:
        UserError: there is none, or no feature in it was made by this project's commands.
    """
    path = folder / RECORD
    if not path.is_file():
        raise UserError(f"{path}: no such file; was {folder} written by training (stage 4) or by sdumc.bin.pack?")
    features, left_out = {}, {}
    for name, settings in read_yaml(path).items():
        if name not in _NEEDED:
            continue
        if not isinstance(settings, dict) or settings.get("imported") or "model" not in settings:
            left_out[name] = "its features were not made by this project's commands"
        elif missing := [key for key in _NEEDED[name] if key not in settings]:
            left_out[name] = f"{RECORD} does not say {', '.join(missing)}; make the features again"
        else:
            features[name] = settings
    if not features:
        raise UserError(
            f"{path}: does not say how a clip becomes features: those of the train set came from elsewhere. Predicting "
            "needs a model trained on features of this project's stages 2 and 3"
        )
    return Record(folder, features, left_out)


def find_model(use: ModelUse, folder: Path, model_dir: Path | None = None) -> Path:
    """The model that the record names: looked for in ``model_dir``, from ``folder`` and those above it, from the
    working directory, and in the local hub cache.

    Raises:
        UserError: it is nowhere, or what is there has other weights than the features were made with.
    """
    name = Path(use.name)
    places = [model_dir / name.name] if model_dir else []
    if name.is_absolute():
        places.append(name)
    else:
        places += [place / name for place in (folder.absolute(), *folder.absolute().parents, Path.cwd())]
    different = []
    for place in dict.fromkeys(places):
        if place.exists():
            if use.hash in (None, fingerprint(place, use.role)):
                return place
            different.append(place)
    if different:
        raise UserError(
            f"{different[0]}: not the {use.role} model that the features were made with (fingerprint "
            f"{fingerprint(different[0], use.role)}, not {use.hash}); give its folder's parent with --model-dir"
        )
    where = f"looked in {model_dir}, " if model_dir else "looked in "
    problem = UserError(
        f"{use.name}: the {use.role} model is not there ({where}{folder} and the folders above it, {Path.cwd()}"
        f"{', the local hub cache' if _is_hub_name(use.name) else ''}). Give the folder that holds {name.name} with "
        f"--model-dir{f'; if that is its name on the hub: hf download {use.name}' if _is_hub_name(use.name) else ''}"
    )
    if not _is_hub_name(use.name):
        raise problem
    from sdumc.pretrained.folders import model_folder

    try:
        cached = model_folder(use.name)
    except UserError:
        raise problem from None
    if use.hash not in (None, fingerprint(cached, use.role)):
        raise UserError(f"{cached}: not the {use.role} model that the features were made with, but another version")
    return cached


def _is_hub_name(name: str) -> bool:
    return name.count("/") <= 1 and not name.startswith((".", "/", "~"))


@lru_cache(maxsize=64)
def fingerprint(path: Path, role: str) -> str:
    """Short hash of a model's weights, as the extraction commands record it."""
    from sdumc.pretrained.folders import fingerprint as of
    from sdumc.pretrained.projector import projector_file

    return of(projector_file(path) if role == "projector" else path)
