"""Loading pretrained models from local folders, and the short trial of each: it must compute the same in our hands.

Folders are checked first, the dtype is explicit, nothing comes from the network. Then our batches, masks and cache must
not change what the model computes.

LLMs have a trial of their own (:func:`sdumc.pretrained.internals.find_attention`).

Encoders, recognisers and vision models: a clip or picture must give the same alone and in a batch. Padding, batch
statistics and randomness make some architectures break that rule. No list of names is complete, so every model is
tried on a little seeded noise before any work.

`predict` and `demo`, whose work takes seconds, remember in the user's cache folder which models have passed
(:func:`remember_passed`): by the fingerprint of the model, the versions of the libraries and of this package's sources,
and the device.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import time
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sdumc.errors import UserError
from sdumc.files import read_json, recall, remember

log = logging.getLogger("sdumc")
R = TypeVar("R")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_OTHER_KIND = ("Unrecognized configuration class", "does not recognize this architecture")
_SMALL_FILE = 256 * 2**20  # bytes; a fingerprint reads smaller weight files whole
_POINTER = b"version https://git-lfs"  # how a file begins that Git LFS has not fetched
# Weights in numbers of 8 bits and less, as safetensors names them. (uint8 and integers are masks and indices too.)
_PACKED = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "U8", "I32")
_PACKED_NAMES = (
    ".qweight",
    ".qzeros",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".absmax",
    ".scales",
    "_blocks",
)


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
    _check_files(folder)
    if (config := read_json(path, "fetch the model again", absent=None)) is None:
        raise UserError(f"{folder}: not a model folder, it has no config.json{_what_else(folder)}")
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{path}: no `model_type` in it; this is not a transformers model folder")
    return config


def plain_config(folder: Path, config: dict[str, Any], supported: str = "") -> Any:
    """The configuration object of a folder with this ``config.json``; its own code, if it has any, is not run.

    Raises:
        UserError: it is of a kind that transformers does not have. Other errors: its values do not fit.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES as KINDS

    if config["model_type"] in KINDS:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    own = ", and code that comes with a model (`auto_map`) is not run" if "auto_map" in config else ""
    raise UserError(
        f"{folder}: a {config['model_type']} model is none that this transformers knows{own}; give "
        f"{supported or 'another model'}"
    )


def _check_files(folder: Path) -> None:
    """Refuse a folder whose settings cannot be read, or are links or pointers to what is not there."""
    try:
        files = sorted(f for f in folder.iterdir() if f.suffix in (".json", ".model", ".txt", ".jinja"))
        gone = [f.name for f in files if not f.exists()]
        unfetched = [f.name for f in files if f.is_file() and _is_pointer(f)]
    except OSError as e:
        raise UserError(f"{e.filename or folder}: cannot be read ({e.strerror}); ask its owner for the right") from None
    if gone:
        raise UserError(f"{folder}: links to files that are not there: {', '.join(gone)}; fetch the model again")
    if unfetched:
        raise UserError(f"{folder}: {_UNFETCHED}: {', '.join(unfetched)}; run `git lfs pull` in it")


_UNFETCHED = "pointers of Git LFS stand for these files"


def _is_pointer(file: Path) -> bool:
    with open(file, "rb") as f:
        return f.read(len(_POINTER)) == _POINTER


def _what_else(folder: Path) -> str:
    """What a folder without the files of a model has, as the end of a refusal."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = read_json(adapter, "fetch it again").get("base_model_name_or_path")
        return f", but a PEFT adapter of {base}: merge the two (`merge_and_unload`), and give the folder of the result"
    if gone := sorted(f.name for f in folder.iterdir() if not f.exists()):
        return f", but links to files that are not there: {', '.join(gone)}; fetch the model again"
    forms = (".gguf", ".ggml", ".onnx", ".h5", ".msgpack", ".nemo", ".ckpt", ".pth", ".pt")
    if others := sorted(f.name for f in folder.iterdir() if f.suffix in forms):
        return f", but {others[0]}, a form that is not read; give the model as transformers saves it"
    if weights := [f.name for f in (*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"))]:
        return f", but weights ({min(weights)}): fetch the model's other files too"
    return ""


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
        f"(nor their index){_what_else(folder) or '; fetch the model again'}"
    )


def whole_weights(folder: Path) -> list[Path]:
    """:func:`weight_files`, after checking that none is cut short; the weights themselves are not read.

    Raises:
        UserError: as there, or a file is cut short, or holds quantised weights of which config.json says nothing.
    """
    files = weight_files(folder)
    if unfetched := [f.name for f in files if _is_pointer(f)]:
        raise UserError(f"{folder}: {_UNFETCHED}: {', '.join(unfetched)}; run `git lfs pull` in it")
    if short := [f.name for f in files if _cut_short(f)]:
        raise UserError(f"{folder}: incomplete model, cut short: {', '.join(short)}; fetch the model again")
    return files


def _table(file: Path) -> dict[str, Any]:
    """The table of contents of a safetensors file: name -> ``dtype``, ``shape``, ``data_offsets``.

    Raises:
        ValueError, KeyError, TypeError, IndexError, AttributeError: there is none; the file is damaged.
    """
    with open(file, "rb") as f:
        start = f.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > 100 * 2**20:
            raise ValueError("no table")
        table = json.loads(f.read(length))
    if file.stat().st_size < 8 + length + max(
        (e["data_offsets"][1] for n, e in table.items() if n != _META), default=0
    ):
        raise ValueError("cut short")
    return {name: entry for name, entry in table.items() if name != _META}


_META = "__metadata__"


def _cut_short(file: Path) -> bool:
    """Whether a weight file ends before its own table of contents says; nothing but that table is read."""
    if file.suffix != ".safetensors":
        with open(file, "rb") as f:
            start = f.read(2)
            # A zip archive of torch has its table at the end; its old format, a pickle, has none.
            return not zipfile.is_zipfile(f) if start == b"PK" else start[:1] != b"\x80"
    try:
        _table(file)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return True
    return False


def _check_numbers(folder: Path, files: Sequence[Path], config: dict[str, Any]) -> None:
    """Refuse quantised weights that transformers would take for plain numbers, in silence."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    settings = config.get("quantization_config") or config.get("compression_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        if method is not None and not any(known.startswith(str(method)) for known in KNOWN):
            raise UserError(f"{folder}: its weights are quantised ({method}), {_FULL}")
        return
    for file in files:
        table = _table(file) if file.suffix == ".safetensors" else {}
        packed = [
            n for n, e in table.items() if (n.endswith("weight") and e["dtype"] in _PACKED) or n.endswith(_PACKED_NAMES)
        ]
        if packed:
            raise UserError(f"{folder}: its weights are quantised ({packed[0]}: {table[packed[0]]['dtype']}), {_FULL}")


_FULL = "in a way that transformers does not read; give the model with full weights (16 or 32 bits)"


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
    config = read_model_config(folder)
    kind, files = config["model_type"], whole_weights(folder)
    attempt(lambda: plain_config(folder, config, supported), f"{folder}/config.json: cannot be used")
    _check_numbers(folder, files, config)
    if (folder / "adapter_config.json").is_file():  # it would count where peft is installed, and there alone
        raise UserError(f"{folder}: beside the model is a PEFT adapter; merge the two, or remove adapter_config.json")
    try:
        with quiet_transformers():
            model, info = model_class.from_pretrained(
                str(folder),
                dtype=dtype,
                local_files_only=True,
                use_safetensors=files[0].suffix == ".safetensors",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are listed, and refused below
                trust_remote_code=False,
            )
    except Exception as e:  # transformers, safetensors and torch raise different errors for a damaged folder
        if any(words in str(e) for words in _OTHER_KIND):  # a list of all the models that there are
            raise UserError(
                f"{folder}: a {kind} model cannot be used here: transformers has no {model_class.__name__} of that kind"
                + (f"; give {supported}" if supported else "")
            ) from None
        raise UserError(f"{folder}: cannot be loaded as {model_class.__name__}: {first_line(e)}") from None
    if others := sorted(info["mismatched_keys"]):
        name, *sizes = [others[0]] if isinstance(others[0], str) else others[0]  # transformers 5 gives the sizes
        them = f": {tuple(sizes[0])}, not {tuple(sizes[1])}" if sizes else ""
        raise UserError(
            f"{folder}: {len(others)} weights have other sizes than config.json says, e.g. {name}{them}; fetch the "
            "model again"
        )
    missing = sorted(k for k in info["missing_keys"] if not k.startswith(("masked_spec_embed", *optional)))
    if missing:
        raise UserError(
            f"{folder}: incomplete model for {type(model).__name__}, {len(missing)} weights are not in the files, "
            f"e.g. {missing[0]}; fetch the model again or give another model"
        )
    if unused := sorted(k for k in info["unexpected_keys"] if _is_further_layer(k, model)):
        log.warning("%s: config.json has fewer layers than the files: %s is not used", folder, unused[0])
    return model.to(device).eval().requires_grad_(False)


def _is_further_layer(key: str, model: Any) -> bool:
    """Whether a weight that the model did not take belongs to a layer after its last one, as ``model.layers.12.``."""
    found = re.match(r"(.*layers?\.)\d+\.", key)
    return found is not None and any(name.startswith(f"{found[1]}0.") for name, _ in model.named_parameters())


def preprocessor(folder: Path) -> dict[str, Any]:
    """Settings of the feature extractor; transformers 5 writes them into ``processor_config.json``."""
    files = [read_json(folder / f"{n}_config.json", "fetch the model again", absent={}) for n in _PREPROCESSORS]
    nested = files[1].get("feature_extractor")
    return files[0] or (nested if isinstance(nested, dict) else {})


_PREPROCESSORS = ("preprocessor", "processor")


def load_preprocessor(folder: Path, load: Callable[[], R], refusal: str) -> R:
    """What ``load()`` makes of a folder's settings for sound or pictures; a UserError with ``refusal`` if it fails."""
    if not any((folder / f"{n}_config.json").exists() for n in _PREPROCESSORS):
        raise UserError(f"{refusal}: there is no preprocessor_config.json; fetch the model again")
    return attempt(load, refusal)


def whisper_spectrogram(folder: Path) -> Any:
    """Whisper's feature extractor; :class:`UserError` if the folder has no usable one."""
    from transformers import WhisperFeatureExtractor

    return load_preprocessor(
        folder,
        lambda: WhisperFeatureExtractor.from_pretrained(str(folder), local_files_only=True),
        f"{folder}: no usable preprocessor_config.json",
    )


def check_rate(folder: Path, rate: int) -> None:
    """Refuse a model of sound whose folder names another sample rate than ``rate``: it would hear all too fast or slow.

    Raises:
        UserError: so, or the settings cannot be read.
    """
    if (own := preprocessor(folder).get("sampling_rate", rate)) != rate:
        raise UserError(f"{folder}: this model hears sound of {own} Hz; give one of {rate} Hz")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; :class:`UserError` if it has none that can be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as e:
        raise UserError(f"{folder}: its tokenizer cannot be loaded: {first_line(e)}") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, at most 250 characters, or the error's name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__
    return text if len(text) <= 250 else f"{text[:250]} ..."


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


_remembers = False
_LARGE = 1 << 30  # bytes of weights from which on a trial may take so long that people wonder


def remember_passed() -> None:
    """From now on, a model that passed on this machine is not tried again."""
    global _remembers
    _remembers = True


def passed(folder: Path, device: torch.device, settings: Sequence[Any], attempt: Callable[[], list]) -> list:
    """The plain values that the trial ``attempt()`` of a model gives; or gave before, with the same settings."""
    if not _remembers:
        return _timed(folder, settings, attempt)
    others = sorted([f.name, f.stat().st_size] for f in folder.iterdir() if f.is_file())
    key = [fingerprint(folder), others, _versions(), _processor(device), [str(s) for s in settings]]
    found = recall("trial", key)
    if not isinstance(found, list):
        found = _timed(folder, settings, attempt)
        remember("trial", key, found)
    return found


def _timed(folder: Path, settings: Sequence[Any], attempt: Callable[[], list]) -> list:
    start = time.monotonic()
    found = attempt()
    size = sum(f.stat().st_size for f in weight_files(folder) if f.is_file())
    level = logging.INFO if size > _LARGE else logging.DEBUG
    log.log(level, "%s: a short trial as %s passed (%.1f s)", folder, settings[0], time.monotonic() - start)
    return found


@cache
def _versions() -> list[str]:
    sources = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        sources.update(file.read_bytes())
    names = ("torch", "transformers", "tokenizers", "numpy", "pillow")
    return [sources.hexdigest(), *(importlib.metadata.version(name) for name in names)]


def _processor(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


_TOLERANCE = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.2}


def trial_waves() -> list[np.ndarray]:
    """Three clips (T_i,) of noise at 16 kHz, 0.6, 0.25 and 0.43 s: the same at every call."""
    rng = np.random.default_rng(0)
    return [rng.normal(0, 0.1, size).astype(np.float32) for size in (9600, 4000, 6900)]


def trial_pictures() -> list[np.ndarray]:
    """Three square RGB pictures of 64, 80 and 96 pixels, uint8: the same at every call."""
    rng = np.random.default_rng(0)
    coarse = [rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(3)]
    return [np.kron(c, np.ones((n, n, 1), np.uint8)) for c, n in zip(coarse, (8, 10, 12), strict=True)]


def difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """How much two results differ: the largest root mean square over D of a frame's difference.

    Each dimension is measured in its own root mean square over ``first``: some encoders have a few dimensions with
    values a hundred times those of the others.

    Args:
        first, second: tensors (T_i, D), one for each clip or picture.

    Returns:
        0 for equal results; infinite if shapes differ or a value is not finite.
    """
    if [x.shape for x in first] != [x.shape for x in second]:
        return float("inf")
    a, b = torch.cat(list(first)).double(), torch.cat(list(second)).double()
    scale = a.square().mean(0).sqrt()
    scale = scale.clamp_min(1e-3 * float(scale.square().mean().sqrt()) + 1e-12)
    worst = float(((a - b) / scale).square().mean(1).sqrt().max())
    return worst if np.isfinite(worst) else float("inf")


def same(first: Sequence[Tensor], second: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether two results, computed in ``dtype``, differ by no more than its rounding."""
    return difference(first, second) <= _TOLERANCE[dtype]


def attempt(compute: Callable[[], R], refusal: str) -> R:
    """``compute()``; any failure within the model becomes a :class:`UserError` that begins with ``refusal``."""
    try:
        return compute()
    except UserError:
        raise
    except Exception as e:  # architectures that do not fit raise all kinds of errors
        raise UserError(f"{refusal}: {first_line(e)}") from None


def try_clips(
    compute: Callable[[Sequence[np.ndarray]], list[Tensor]],
    num_frames: Callable[[int], int] | None,
    dtype: torch.dtype,
    refusal: str,
) -> tuple[bool, list[Tensor]]:
    """Try a model on three clips alone, again, and in a batch.

    Args:
        compute: clips (T_i,) at 16 kHz -> (frames_i, D). num_frames: frames that a clip of so many samples must give.
        refusal: how the error begins, with the model's folder.

    Returns:
        Whether the model must be given one clip at a time, as its frames depend on what else is in the batch; and the
        frames of the three clips alone.

    Raises:
        UserError: it fails on a single clip, gives another number of frames or values that are not finite, or does
            not repeat itself.
    """
    waves = trial_waves()

    def alone() -> list[Tensor]:
        return [compute([w])[0] for w in waves]

    first = attempt(alone, refusal)
    for wave, frames in zip(waves, first, strict=True):
        if num_frames is not None and len(frames) != num_frames(len(wave)):
            expected, seconds = num_frames(len(wave)), len(wave) / 16000
            raise UserError(
                f"{refusal}: {len(frames)} frames for {seconds:g} s of sound, where {expected} are expected"
            )
        if not bool(torch.isfinite(frames).all()):
            raise UserError(f"{refusal}: its output is not finite in {str(dtype).removeprefix('torch.')}")
    if not same(first, attempt(alone, refusal), dtype):
        raise UserError(f"{refusal}: the same clip gives another result each time")
    try:
        together = compute(waves)
    except Exception:  # it works alone
        return True, first
    return not same(first, together, dtype), first
