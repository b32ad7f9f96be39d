"""Loading pretrained models from local folders: checked first, dtype explicit, never from the network."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from sdumc.errors import UserError
from sdumc.files import read_json

log = logging.getLogger("sdumc")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OTHER_KIND = ("Unrecognized configuration class", "does not recognize this architecture")
_SMALL_FILE = 256 * 2**20  # bytes; a fingerprint reads smaller weight files whole


def model_folder(name: str | os.PathLike) -> Path:
    """The folder of a model given as a folder, or by its hub name if its files are in the local hub cache.

    Raises:
        UserError: there is no such folder, and the name is not in the cache (nothing is downloaded here).
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{path}: expected a model folder with a config.json in it, found a file")
    if str(name).count("/") > 1 or str(name).startswith((".", "/")):
        raise UserError(f"{path}: no such model folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), local_files_only=True))
    except Exception:
        raise UserError(
            f"{name}: neither a folder nor a model in the local hub cache. Give the folder of a downloaded model "
            "(nothing is fetched while a stage runs)"
        ) from None


def read_model_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder as a dict; :class:`UserError` if it is absent or not JSON."""
    path = folder / "config.json"
    if (config := read_json(path, "fetch the model again", absent=None)) is None:
        raise UserError(f"{folder}: not a model folder, it has no config.json")
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{path}: no `model_type` in it; this is not a transformers model folder")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, safetensors preferred, after checking that every shard is there.

    Raises:
        UserError: no weights, or a shard is absent or empty.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as e:
                raise UserError(f"{index}: cannot be read ({e!r}); fetch the model again") from None
            files = [folder / s for s in shards]
        elif (folder / single).exists():
            files = [folder / single]
        else:
            continue
        bad = [f.name for f in files if not f.is_file() or f.stat().st_size == 0]
        if bad:
            raise UserError(f"{folder}: incomplete model, missing or empty: {', '.join(bad)}; fetch the model again")
        return files
    raise UserError(
        f"{folder}: incomplete model, there is neither model.safetensors nor pytorch_model.bin "
        "(nor their index); fetch the model again"
    )


def whole_weights(folder: Path) -> list[Path]:
    """:func:`weight_files`, after checking that none is cut short; the weights themselves are not read.

    Raises:
        UserError: as there, or a file is cut short.
    """
    files = weight_files(folder)
    if short := [f.name for f in files if _cut_short(f)]:
        raise UserError(f"{folder}: incomplete model, cut short: {', '.join(short)}; fetch the model again")
    return files


def _cut_short(file: Path) -> bool:
    """Whether a weight file ends before its own table of contents says; nothing but that table is read."""
    with open(file, "rb") as f:
        start = f.read(8)
        if start[:2] == b"PK":  # a zip archive of torch, its table is at the end
            return not zipfile.is_zipfile(f)
        if file.suffix != ".safetensors":
            return False  # torch's old format has no table
        length = int.from_bytes(start, "little")
        try:
            table = json.loads(f.read(length)) if length < 100 * 2**20 else {}
            ends = [entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return True
        return len(start) < 8 or file.stat().st_size < 8 + length + max(ends, default=0)


def fingerprint(path: str | os.PathLike) -> str:
    """A short hash that changes with the weights: of whole files if small, else of their sizes, heads and tails."""
    path = Path(path)
    digest = hashlib.sha256()
    files = [path / "config.json", *weight_files(path)] if path.is_dir() else [path]
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as f:
            if size <= _SMALL_FILE:
                while block := f.read(2**22):
                    digest.update(block)
            else:
                digest.update(f.read(2**20))
                f.seek(-(2**20), os.SEEK_END)
                digest.update(f.read())
    return digest.hexdigest()[:16]


def load_model(
    model_class: Any,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    optional: tuple[str, ...] = (),
    supported: str = "",
) -> Any:
    """``model_class.from_pretrained(folder)`` for inference: eval mode, no gradients, all weights from the files.

    Transformers initialises weights that a checkpoint lacks at random. Here that is an error, except for parameters
    whose names begin with one of ``optional`` (those that the caller does not use). ``supported`` says, to a user whose
    model is of a kind that ``model_class`` does not have, which can be given.

    Raises:
        UserError: the folder is incomplete, damaged, or of another architecture.
    """
    kind = read_model_config(folder)["model_type"]
    safetensors = whole_weights(folder)[0].suffix == ".safetensors"
    try:
        with quiet_transformers():
            model, info = model_class.from_pretrained(
                str(folder),
                dtype=dtype,
                local_files_only=True,
                use_safetensors=safetensors,
                output_loading_info=True,
            )
    except Exception as e:  # transformers, safetensors and torch raise different errors for a damaged folder
        if any(words in str(e) for words in _OTHER_KIND):  # a list of all the models that there are
            raise UserError(
                f"{folder}: a {kind} model cannot be used here: transformers has no {model_class.__name__} of that kind"
                + (f"; give {supported}" if supported else "")
            ) from None
        raise UserError(f"{folder}: cannot be loaded as {model_class.__name__}: {first_line(e)}") from None
    missing = sorted(k for k in info["missing_keys"] if not k.startswith(("masked_spec_embed", *optional)))
    if missing:
        raise UserError(
            f"{folder}: incomplete model for {type(model).__name__}, {len(missing)} weights are not in the files, "
            f"e.g. {missing[0]}; fetch the model again or give another model"
        )
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; :class:`UserError` if it has none that can be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as e:
        raise UserError(f"{folder}: its tokenizer cannot be loaded: {first_line(e)}") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not empty, or the error's name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip()


@contextlib.contextmanager
def quiet_transformers():
    """No progress bars or tables of weights in job logs: :func:`load_model` itself checks that all were loaded."""
    from transformers.utils import logging as hf_logging

    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
