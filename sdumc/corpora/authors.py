"""What the SDUMC authors share: feature folders with a ``.npy`` an utterance, a label file, a transcript table."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sdumc.corpora.importing import Corpus, FeatureWriter, Fold, split_name
from sdumc.data.kaldi_dir import shard
from sdumc.data.pickles import load_npy, load_npz_dicts
from sdumc.data.shards import Merged, ShardWriter, merge_shards
from sdumc.data.tables import read_csv
from sdumc.errors import UserError
from sdumc.files import settings_hash

log = logging.getLogger("sdumc")

# Folder names as released.
FOLDERS = {
    "audio": "wavlm-large-FRA_-5",
    "video": "manet_FRA",
    "text": "vicuna-7b-v1.5-FRA-wavlm2vicuna-half-gt",
    "text_sim": "vicuna-7b-v1.5-FRA-wavlm2vicuna-half-wav+prompt[take_generate_wordembed_-4]",
}
CORPORA = {"train": "train_corpus", "valid": "val_corpus", "test": "test_corpus"}
_COMMIT_EVERY = 64


def read_authors(
    features_dir: str,
    labels: str,
    transcripts: str | None,
    folders: Mapping[str, str],
    num_jobs: int,
    max_absent: float,
) -> Corpus:
    """Read the label file and the transcript table, and list the feature files.

    Args:
        features_dir: the folder that holds the feature folders.
        labels: ``label_official.npz``.
        transcripts: CSV table with the columns name and english.
        folders: feature -> name of its folder; features whose folder is not there are left out.
        num_jobs: processes that convert.
        max_absent: largest share of a fold's utterances that may lack a feature.

    Raises:
        UserError: a file is not of the expected form, or there is none of the folders.
    """
    if num_jobs < 1:
        raise UserError("--num-jobs must be at least 1")
    root = Path(features_dir)
    folds, files = read_labels(Path(labels), Path(transcripts) if transcripts else None)
    found = {name: list_features(root / folder) for name, folder in folders.items() if (root / folder).is_dir()}
    if not found:
        raise UserError(f"{root}: has none of the folders {', '.join(folders.values())}")
    result = Corpus(list(folds.values()))
    result.notes = [
        f"{name}: left out, there is no {root / folder}" for name, folder in folders.items() if name not in found
    ]
    for fold in result.folds:
        for utt in list(fold.utterances):
            if not any(files[fold.name][utt] in present for present in found.values()):
                fold.leave_out(utt, "label without a single feature file")
    labelled = {theirs for by_utterance in files.values() for theirs in by_utterance.values()}
    for name, present in found.items():
        result.unused.update(dict.fromkeys(present.keys() - labelled, f"feature file without a label ({name})"))

    def writer(name: str) -> FeatureWriter:
        def write(fold: Fold, folder: Path) -> list[str]:
            names = {utt: files[fold.name][utt] for utt in fold.utterances}
            merged = import_feature(name, root / folders[name], found[name], names, folder, num_jobs, max_absent)
            if not merged.absent:
                return []
            first, reason = next(iter(merged.absent.items()))
            return [f"{name}: {len(merged.absent)} utterances have none, such as {first}: {reason}"]

        return write

    result.features = {name: writer(name) for name in found}
    return result


def read_labels(labels: Path, transcripts: Path | None) -> tuple[dict[str, Fold], dict[str, dict[str, str]]]:
    """Folds from ``label_official.npz`` and the transcript table.

    Returns:
        the folds, and for each one utterance -> name of its feature files.

    Raises:
        UserError: a file is not of the expected form, an utterance is twice in it, or a label is missing.
    """
    content = load_npz_dicts(labels)
    texts = read_transcripts(transcripts) if transcripts else {}
    folds: dict[str, Fold] = {}
    files: dict[str, dict[str, str]] = {}
    for name, key in CORPORA.items():
        corpus = content.get(key)
        if not isinstance(corpus, dict) or not corpus:
            raise UserError(f"{labels}: has no dict {key!r}; is it the authors' label_official.npz?")
        fold, files[name] = Fold(name), {}
        for theirs, entry in corpus.items():
            value = entry.get("val") if isinstance(entry, dict) else None
            if not isinstance(value, (int, float, np.number)):
                raise UserError(f"{labels}: {key}: {theirs!r}: has no number 'val'; is it the authors' file?")
            speaker, utt = split_name(str(theirs))
            fold.add(utt, speaker, float(value), texts.get(str(theirs), ""))
            files[name][utt] = str(theirs)
        without_text = [str(theirs) for theirs in corpus if str(theirs) not in texts]
        if transcripts and without_text:
            fold.notes.append(
                f"{len(without_text)} utterances have no line in {transcripts}, such as {without_text[0]}"
            )
        folds[name] = fold
    return folds, files


def read_transcripts(path: Path) -> dict[str, str]:
    """The columns ``name`` and ``english`` of a CSV table.

    Raises:
        UserError: see :func:`sdumc.data.tables.read_csv`; a column is missing, or a name has two different texts.
    """
    result: dict[str, str] = {}
    table = read_csv(path)
    for column in ("name", "english"):
        if column not in table.columns:
            raise UserError(f"{path}: has no column {column!r}; is it the authors' transcript table?")
    for number, row in table.rows:
        name, text = row["name"], " ".join(row["english"].split())
        if result.setdefault(name, text) != text:
            raise UserError(f"{path}:{number}: {name!r} has another text before; remove one line")
    return result


def list_features(folder: Path) -> dict[str, tuple[int, int]]:
    """Names of the ``.npy`` files in a folder, without their ending, with size and time of change."""
    found = {}
    try:
        for entry in os.scandir(folder):
            if entry.name.endswith(".npy") and not entry.name.startswith("."):
                status = entry.stat()
                found[entry.name[:-4]] = (status.st_size, status.st_mtime_ns)
    except OSError as e:
        raise UserError(f"{folder}: cannot be read ({e.strerror}); give the folder of the features") from None
    if not found:
        raise UserError(f"{folder}: has no .npy files; unpack the features there")
    return found


def load_feature(path: Path) -> np.ndarray:
    """An utterance's features as float32 (T, D); a vector is one frame, T is 0 for an empty array.

    Raises:
        UserError: not an array of one to two dimensions (others of length one apart), or cut short.
    """
    array = load_npy(path)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise UserError(f"{path}: holds no array of numbers")
    if array.size == 0:
        return np.zeros((0, 1), np.float32)
    while array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 1:
        array = array[None]
    if array.ndim != 2:
        raise UserError(f"{path}: shape {array.shape}, expected (frames, dimension)")
    return array.astype(np.float32, copy=False)


def import_feature(
    name: str,
    folder: Path,
    found: Mapping[str, tuple[int, int]],
    files: Mapping[str, str],
    dump_dir: Path,
    jobs: int,
    max_absent: float,
) -> Merged:
    """Write a feature of one set as archives and index, with ``jobs`` processes; a killed run continues.

    An utterance without a file, or with an empty one, is absent in this feature and listed as such. Archives made from
    files that have changed since are made again.

    Args:
        name: the feature.
        folder: its ``.npy`` files.
        found: what :func:`list_features` returns for ``folder``.
        files: utterance -> name of its file.
        dump_dir: where the archives and the index go.
        jobs: processes.
        max_absent: largest share of the utterances that may have no file.

    Raises:
        UserError: more than ``max_absent`` of the utterances have no file, a file cannot be read, or dimensions differ.
    """
    lacking = sorted(u for u, n in files.items() if n not in found)
    if len(lacking) > max_absent * len(files):
        raise UserError(
            f"{folder}: {len(lacking)} of {len(files)} utterances of {dump_dir.name} have no .npy file, the first: "
            f"{files[lacking[0]]}; complete the folder, or allow more with --max-drop"
        )
    state = [(utt, files[utt], found.get(files[utt])) for utt in sorted(files)]
    settings = {"extractor": "imported", "folder": folder.name, "data_hash": settings_hash({"files": state})}
    work = partial(_import_shard, name, folder, dump_dir, settings, files, frozenset(lacking), jobs)
    if jobs == 1:
        work(1)
    else:
        with ProcessPoolExecutor(max_workers=jobs) as pool:
            list(pool.map(work, range(1, jobs + 1)))
    merged = merge_shards(dump_dir, name, jobs, {**settings, "imported": True}, files)
    log.info(
        "%s.scp: %d utterances, %s dimensions, %d absent",
        dump_dir / name,
        len(merged.frames),
        merged.dim,
        len(merged.absent),
    )
    return merged


def _import_shard(
    name: str,
    folder: Path,
    dump_dir: Path,
    settings: Mapping[str, Any],
    files: Mapping[str, str],
    lacking: frozenset[str],
    jobs: int,
    job: int,
) -> None:
    """Write the archive of job ``job`` of ``jobs``; ``lacking`` are the utterances without a file."""
    utterances = shard(list(files), f"{job}/{jobs}")
    with ShardWriter(dump_dir, name, job, settings, utterances) as writer:
        for number, utt in enumerate((u for u in utterances if u not in writer.done), start=1):
            if utt in lacking:
                writer.absent(utt, f"no file {files[utt]}.npy in {folder.name}")
                continue
            path = folder / f"{files[utt]}.npy"
            matrix = load_feature(path)
            if not np.isfinite(matrix).all():
                raise UserError(f"{path}: NaN or infinite values; fetch the file again, or remove it")
            if len(matrix):
                writer.write(utt, matrix)
            else:
                writer.absent(utt, f"empty file {files[utt]}.npy")
            if number % _COMMIT_EVERY == 0:
                writer.commit()
