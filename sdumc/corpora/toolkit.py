"""The feature pickles of the field's common toolkit: ``unaligned_50.pkl``, ``aligned_50.pkl`` of MOSEI and MOSI.

``{train, valid, test} -> {id, raw_text, audio (N, T, A), vision (N, T, V), text (N, 50, 768), text_bert (N, 3, 50),
audio_lengths, vision_lengths, regression_labels}``, zero-padded to one length. In the aligned file all three have a
frame per word piece, and the text's length is that of all.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from sdumc.corpora.annotations import Transcripts, find_labels, give_times, read_labels, read_transcripts
from sdumc.corpora.importing import FOLDS, Corpus, FeatureWriter, Fold, split_name
from sdumc.corpora.raw import MediaFiles, find_media, locate, raw_root
from sdumc.data.pickles import plain_text, restricted_load
from sdumc.data.shards import ShardWriter, merge_shards
from sdumc.errors import UserError
from sdumc.scale import CMU, LabelScale

log = logging.getLogger("sdumc")

# SHA-256 of the published files: the corpus, as --counts has it, and the file's name.
PUBLISHED_SHA256 = {
    "ad8b23d50557045e7d47959ce6c5b955d8d983f2979c7d9b7b9226f6dd6fec1f": ("mosei", "unaligned_50.pkl"),
    "45eccfb748a87c80ecab9bfac29582e7b1466bf6605ff29d3b338a75120bf791": ("mosei", "aligned_50.pkl"),
    "78e0f8b5ef8ff71558e7307848fc1fa929ecb078203f565ab22b9daab2e02524": ("mosi", "unaligned_50.pkl"),
    "d3994fd25681f9c7ad6e9c6596a6fe9b4beb85ff7d478ba978b124139002e5f9": ("mosi", "aligned_50.pkl"),
    "c9e20c13ec0454d98bb9c1e520e490c75146bfa2dfeeea78d84de047dbdd442f": ("sims", "unaligned_39.pkl"),
}
_CORPUS_NAMES = {"mosei": "CMU-MOSEI", "mosi": "CMU-MOSI", "sims": "CH-SIMS"}
FEATURES = {"audio": "audio", "text": "text", "video": "vision"}  # our name -> theirs
_COMMIT_EVERY = 256
_ENOUGH = 10  # labels, to say that they are on another scale


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        UserError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as f:
            while block := f.read(2**22):
                digest.update(block)
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    return digest.hexdigest()


def describe_sha256(path: Path, digest: str, wanted: str | None, corpus: str = "mosei") -> str:
    """A line about the file's identity; ``corpus`` is the one it should be of.

    Raises:
        UserError: ``wanted`` is given and is another, or the file is the published one of another corpus.
    """
    if wanted and wanted.lower() != digest:
        raise UserError(f"{path}: its SHA-256 is {digest}, not {wanted.lower()}; fetch the file again")
    line = f"{path.name}: SHA-256 {digest}"
    if digest in PUBLISHED_SHA256:
        owner, name = PUBLISHED_SHA256[digest]
        if corpus in _CORPUS_NAMES and owner != corpus:
            raise UserError(f"{path}: is {_CORPUS_NAMES[owner]}'s {name}, and not of {_CORPUS_NAMES[corpus]}")
        return f"{line}, {_CORPUS_NAMES[owner]}'s {name} as published"
    if wanted:
        return f"{line}, as asked for"
    if (corpus, path.name) in PUBLISHED_SHA256.values():
        name = f"{_CORPUS_NAMES[corpus]}'s {path.name}"
        return f"{line}, which is not that of {name} as published: another release, or a damaged copy"
    return f"{line}; no published file is known here to compare it with"


@dataclass
class Part:
    """One fold of a pickle: arrays as they are in the file, utterance ids in the file's order."""

    fold: Fold
    order: list[str]
    content: Mapping[str, Any]
    clips: dict[str, tuple[str, str]] = field(default_factory=dict)  # utterance -> (video, clip)


def read_toolkit(
    pickle: str,
    features: Sequence[str],
    corpus: str,
    sha256: str | None = None,
    corpus_dir: str | None = None,
    media: str = "auto",
    scale: LabelScale = CMU,
) -> Corpus:
    """Read a pickle, and find the media of its clips where there are any.

    Args:
        pickle: the file.
        features: which of audio, text and video are taken from it.
        corpus: the corpus that the file should be of, ``mosei``, ``mosi``, ``sims`` or ``none``.
        scale: of the labels.
        sha256: what the file's SHA-256 has to be, if given.
        corpus_dir, media: raw distribution with the same clips, see :func:`sdumc.corpora.raw.read_raw`.

    Raises:
        UserError: the file is another one than asked for or not a pickle of the toolkit, or media cannot be found.
    """
    path = Path(pickle)
    digest = file_sha256(path)
    identity = describe_sha256(path, digest, sha256, corpus)
    log.info("%s", identity)
    parts = read_pickle(path, scale)
    labels = [u.label for part in parts.values() for u in part.fold.utterances.values()]
    if scale == CMU and len(labels) >= _ENOUGH and max(map(abs, labels)) <= 1:
        raise UserError(f"{path}: {len(labels)} labels, and all from -1 to 1: declare --label-scale sims (CH-SIMS's)")
    result = Corpus([part.fold for part in parts.values()], [identity])
    if corpus_dir:
        root = raw_root(corpus_dir)
        files = find_media(root, media)
        _give_media(parts, root, files)
        result.notes.append(f"media: {files.how} of {root}")
        result.unused = dict.fromkeys(files.unused, "media without a label in the pickle")

    def writer(feature: str) -> FeatureWriter:
        return lambda fold, folder: write_feature(path, parts[fold.name], feature, folder, digest)

    result.features = {feature: writer(feature) for feature in features}
    return result


def read_pickle(path: Path, scale: LabelScale = CMU) -> dict[str, Part]:
    """Load a pickle through the restricted unpickler: ids, texts and labels as folds; the features stay as they are.

    Needs as much memory as the file is long.

    Raises:
        UserError: the file is not such a pickle, a fold or key is missing, or lengths do not agree.
    """
    content = restricted_load(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in FOLDS):
        raise UserError(
            f"{path}: has no folds {', '.join(FOLDS)}; is it the toolkit's unaligned_50.pkl or aligned_50.pkl?"
        )
    return {name: _read_part(path, name, content[name], scale) for name in FOLDS}


def _read_part(path: Path, name: str, content: Mapping[str, Any], scale: LabelScale) -> Part:
    for key in ("id", "regression_labels"):
        if key not in content:
            raise UserError(f"{path}: {name} has no {key!r}; is it the toolkit's file?")
    names = [plain_text(i, f"{path}: {name}: id") for i in content["id"]]
    labels = _numbers(path, name, content, "regression_labels")
    texts = [plain_text(t, f"{path}: {name}: raw_text") for t in content.get("raw_text", [""] * len(names))]
    for key, length in (("regression_labels", len(labels)), ("raw_text", len(texts))):
        if length != len(names):
            raise UserError(f"{path}: {name} has {len(names)} ids, but {length} in {key!r}; fetch the file again")
    part = Part(Fold(name, scale=scale), [], content)
    for their_name, label, text in zip(names, labels, texts, strict=True):
        speaker, utt = split_name(their_name)
        part.fold.add(utt, speaker, float(label), text)
        part.order.append(utt)
        video, _, clip = utt.rpartition("-")
        part.clips[utt] = (video, clip) if video == speaker else (speaker, "")
    return part


def _numbers(path: Path, name: str, content: Mapping[str, Any], key: str) -> np.ndarray:
    """An array of numbers (N,), whatever it is stored as."""
    try:
        return np.asarray(content[key], dtype=np.float64).reshape(-1)
    except (TypeError, ValueError) as e:
        raise UserError(f"{path}: {name}: {key} is not an array of numbers ({e}); ask for another copy") from None


def _matrices(path: Path, part: Part, theirs: str) -> Any:
    """The feature's matrices (T, D) of all utterances: an array (N, T, D), or a list of matrices of different lengths.

    Raises:
        UserError: it is neither.
    """
    content, count = part.content[theirs], len(part.order)
    if not isinstance(content, np.ndarray) or content.dtype == object:
        try:
            matrices = [np.asarray(m, dtype=np.float32) for m in content]
        except (TypeError, ValueError) as e:
            raise UserError(f"{path}: {part.fold.name}: {theirs!r} holds something else than numbers ({e})") from None
        shapes = sorted({m.shape[1:] for m in matrices} | {(m.ndim,) for m in matrices if m.ndim != 2})
        if len(matrices) == count and len(shapes) == 1 and matrices[0].ndim == 2:
            return matrices
        raise UserError(
            f"{path}: {part.fold.name}: {theirs!r} has {len(matrices)} entries for {count} utterances, of shapes "
            f"{[m.shape for m in matrices[:3]]}; expected a matrix (T, D) of one width for each"
        )
    if content.ndim != 3 or len(content) != count:
        raise UserError(
            f"{path}: {part.fold.name}: {theirs!r} has shape {content.shape}, expected ({count}, T, D) numbers"
        )
    return content


def _give_media(parts: Mapping[str, Part], root: Path, media: MediaFiles) -> None:
    """Find the media of every utterance; leave out those that have no media or no text."""
    transcripts = Transcripts()
    if not media.segmented:  # the transcripts say where a clip is in its video
        transcripts = read_transcripts(root)
        if transcripts.lack_times:
            give_times(transcripts, read_labels(find_labels(root)).times)
    for part in parts.values():
        for utt, utterance in list(part.fold.utterances.items()):
            video, clip = part.clips[utt]
            found = locate(transcripts.clips.get(video, {}).get(clip), video, clip, media)
            if isinstance(found, str):
                part.fold.leave_out(utt, found)
            elif not utterance.text:
                part.fold.leave_out(utt, "empty transcript")
            else:
                part.fold.utterances[utt] = replace(utterance, media=found)


@dataclass
class Trimmed:
    """Counts of what was changed while a feature was cut to its true lengths."""

    values: int = 0  # non-finite values set to 0
    utterances: int = 0  # utterances that had any
    longer: int = 0  # stated lengths beyond the array
    front: int = 0  # padded in front
    beyond: int = 0  # with values beyond the stated length
    absent: int = 0  # of length 0, or zero throughout

    def lines(self, name: str) -> list[str]:
        """Notes for the summary, one string each."""
        notes = []
        if self.values:
            notes.append(f"{name}: {self.values} values of {self.utterances} utterances were not finite, set to 0")
        if self.longer:
            notes.append(f"{name}: {self.longer} stated lengths are longer than the array, cut to it")
        if self.front:
            notes.append(f"{name}: {self.front} utterances are padded in front, taken from the end")
        if self.beyond:
            notes.append(f"{name}: {self.beyond} utterances have values beyond their stated length, cut off")
        if self.absent:
            notes.append(f"{name}: {self.absent} utterances have none (length 0, or zeros throughout): absent")
        return notes


def true_lengths(path: Path, part: Part, feature: str) -> np.ndarray | None:
    """Frames of each utterance (N,) int64, or None if the file does not tell.

    For text, the length of the attention mask in ``text_bert``; for the others ``<name>_lengths``, or in an aligned
    file the text's.

    Raises:
        UserError: the lengths are not one number an utterance.
    """
    theirs = FEATURES[feature]
    content, count = part.content, len(part.order)
    mask = None
    if "text_bert" in content:
        bert = np.asarray(content["text_bert"])
        if bert.ndim != 3 or bert.shape[:2] != (count, 3):
            raise UserError(f"{path}: {part.fold.name}: text_bert has shape {bert.shape}, expected ({count}, 3, T)")
        mask = (bert[:, 1] > 0.5).sum(axis=1).astype(np.int64)
    if feature == "text":
        return mask
    if f"{theirs}_lengths" in content:
        lengths = _numbers(path, part.fold.name, content, f"{theirs}_lengths").astype(np.int64)
        if len(lengths) != count or (lengths < 0).any():
            raise UserError(
                f"{path}: {part.fold.name}: {theirs}_lengths has {len(lengths)} values for {count} utterances"
            )
        return lengths
    if not isinstance(content[theirs], np.ndarray) or not isinstance(content.get("text"), np.ndarray):
        return None
    aligned = content["text"].shape[1:2] == content[theirs].shape[1:2]
    return mask if aligned else None


def trim(array: np.ndarray, length: int | None, counts: Trimmed) -> np.ndarray:
    """The true frames of a padded matrix (T, D) as float32, with 0 for what is not finite.

    0 is what the toolkit itself puts there. Without a stated ``length``, zero frames at the end are padding. An
    utterance that is padded in front, by its zeros, is taken from the end.

    Returns:
        (length, D); no rows if there is nothing but zeros.
    """
    array = np.asarray(array, dtype=np.float32)
    finite = np.isfinite(array)
    if not finite.all():
        counts.values += int((~finite).sum())
        counts.utterances += 1
        array = np.where(finite, array, np.float32(0))
    used = np.flatnonzero(array.any(axis=1))
    if not len(used):
        counts.absent += 1
        return array[:0]
    if length is None:
        return array[: used[-1] + 1]
    if length > len(array):
        counts.longer += 1
        length = len(array)
    if length == 0:
        counts.absent += 1
        return array[:0]
    if used[-1] >= length:
        if used[0] >= len(array) - length:
            counts.front += 1
            return array[len(array) - length :]
        counts.beyond += 1
    result = array[:length]
    if not result.any():
        counts.absent += 1
        return array[:0]
    return result


def write_feature(path: Path, part: Part, feature: str, dump_dir: Path, digest: str) -> list[str]:
    """Write one feature of one fold into ``dump_dir`` as archive and index; only the utterances kept in ``part.fold``.

    Returns:
        Notes about what was changed; see :class:`Trimmed`.

    Raises:
        UserError: the feature is missing, or has another shape than expected.
    """
    theirs = FEATURES[feature]
    if theirs not in part.content:
        raise UserError(f"{path}: {part.fold.name} has no {theirs!r}; is it the toolkit's file?")
    array = _matrices(path, part, theirs)
    lengths = true_lengths(path, part, feature)
    rows = {utt: i for i, utt in enumerate(part.order)}
    utterances = sorted(part.fold.utterances)
    counts = Trimmed()
    settings = {"extractor": "imported", "file": path.name, "sha256": digest, "array": theirs, "non_finite": 0}
    dim = int(array[0].shape[1])
    settings["dim"] = dim
    with ShardWriter(dump_dir, feature, 1, settings, utterances) as writer:
        for number, utt in enumerate(utterances, start=1):
            i = rows[utt]
            matrix = trim(array[i], None if lengths is None else int(lengths[i]), counts)
            if utt in writer.done:
                continue
            if len(matrix):
                writer.write(utt, matrix)
            else:
                writer.absent(utt, "no frames, or zeros throughout")
            if number % _COMMIT_EVERY == 0:
                writer.commit()
    merged = merge_shards(dump_dir, feature, 1, {**settings, "imported": True}, utterances)
    log.info("%s.scp: %d utterances, %d dimensions", dump_dir / feature, len(merged.frames), dim)
    lines = counts.lines(feature)
    if lengths is None:
        lines.append(f"{feature}: the file states no lengths; zero frames at the end were taken for padding")
    return lines
