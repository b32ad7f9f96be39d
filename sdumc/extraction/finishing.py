"""Joining the shards of a feature, and writing the transcripts that are in their notes."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from sdumc.conditions import ASR_SHARDS, NO_SPEECH, TRANSCRIPTS
from sdumc.data.kaldi_dir import KaldiDir
from sdumc.data.shards import Merged, merge_shards
from sdumc.data.tables import write_table
from sdumc.errors import UserError
from sdumc.files import atomic_write, read_json, write_json, write_text
from sdumc.pretrained.quality import (
    LIKELIHOOD,
    SOUND,
    Sounds,
    from_numbers,
    likelihood,
    summarise,
    word_error_rate,
)

log = logging.getLogger("sdumc")

BAD_MEDIA = "bad_media"  # the note of an utterance whose media could not be read: why


def finish(data: KaldiDir, dump_dir: Path, name: str, num_jobs: int, max_drop: float) -> Merged:
    """Join the shards of a feature, and write the transcripts that they may hold.

    Args:
        max_drop: the largest share of utterances (0 to 1) whose media could not be read.

    Raises:
        UserError: more of them could not be read, or the shards are not whole (:func:`merge_shards`).
    """
    described, _ = _shard_made_by(dump_dir, name)  # merge_shards checks that all jobs agree
    of_recogniser = name in ("text_sim", "text_asr") and (data.path / "text_asr").is_file()
    if of_recogniser and _manifest(dump_dir, ASR_SHARDS).is_file():
        asr, versions = _shard_made_by(dump_dir, ASR_SHARDS)
        # Whose transcripts these are; in simulated text, whose transcripts replaced refusals and empty answers.
        described["asr"] = {**asr, "versions": versions}
    if name == "text_asr":
        quality = read_json(dump_dir / "text_asr.quality.json", "run stage 2 again", absent={})
        described |= {k: quality[k] for k in (LIKELIHOOD,) if k in quality}
    for table in ("utt2label", "utt2spk"):  # before the index, so that a dump with an index is complete
        if (data.path / table).is_file():
            _copy(data.path / table, dump_dir / table)

    def check(found: Merged) -> None:
        _check_media(name, found, max_drop)
        if name == "text_sim":  # what predict compares a clip's text and sound with
            if likely := likelihood(found.notes.values()):
                described[LIKELIHOOD] = likely
            if sounds := _sounds(found, data):
                described[SOUND] = sounds.as_dict()

    merged = merge_shards(dump_dir, name, num_jobs, described, data.utterances, check)
    if name in TRANSCRIPTS:
        write_transcripts(name, data, dump_dir, merged)
    return merged


def _sounds(merged: Merged, data: KaldiDir) -> Sounds | None:
    """How the sound of a set's clips is spread."""
    found = {u: from_numbers(n[SOUND]) for u, n in merged.notes.items() if SOUND in n}
    return Sounds.of(np.array(list(found.values())), [data.utt2spk.get(u, u) for u in found])


def _manifest(dump_dir: Path, name: str) -> Path:
    return dump_dir / "ark" / f"{name}.1.json"


def _shard_made_by(dump_dir: Path, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings and the versions that made the first shard of a feature."""
    path = _manifest(dump_dir, name)
    manifest = read_json(path, "remove it and run its job again", absent=None)
    if manifest is None:
        raise UserError(f"{path}: not there; run the jobs of this feature first")
    if "settings" not in manifest:
        raise UserError(f"{path}: damaged; remove it and run its job again")
    return manifest["settings"], manifest.get("versions", {})


def _copy(source: Path, target: Path) -> None:
    if target.is_file() and target.read_bytes() == source.read_bytes():
        return  # keeps its time, by which recipes decide whether to train again
    with open(source, "rb") as f, atomic_write(target, "wb") as g:
        shutil.copyfileobj(f, g)


def _check_media(name: str, merged: Merged, max_drop: float) -> None:
    """Raise a UserError when too many utterances lack the feature for their media, not for what is in them."""
    bad = [u for u, notes in merged.notes.items() if BAD_MEDIA in notes]
    if not bad:
        return
    count = len(merged.frames.keys() | merged.absent.keys() | merged.notes.keys())
    first = "; ".join(f"{u}: {merged.notes[u][BAD_MEDIA]}" for u in bad[:3])
    if len(bad) > max_drop * count:
        raise UserError(
            f"{name}: the media of {len(bad)} of {count} utterances ({100 * len(bad) / count:.1f}%) could not be read, "
            f"more than the {100 * max_drop:g}% allowed. The first: {first}. Mend them and run the stage again with "
            "--force, or allow more with --max-drop"
        )
    log.warning("%s: the media of %d of %d utterances could not be read, the first: %s", name, len(bad), count, first)


def write_transcripts(name: str, data: KaldiDir, dump_dir: Path, merged: Merged) -> None:
    """Write DATA_DIR/<text>, DUMP_DIR/<text>.status.tsv and .quality.json from the notes of the shards ``name``."""
    text_name = TRANSCRIPTS[name]
    notes = {u: merged.notes.get(u, {}) for u in data.utterances}
    texts = {u: n.get("hyp", "") for u, n in notes.items()}
    raw = {u: n.get("raw", texts[u]) for u, n in notes.items()}
    status = {u: n.get("status", "empty") for u, n in notes.items()}
    fallback = {u: n.get("fallback", "none") for u, n in notes.items()}
    sure = {u: n.get(LIKELIHOOD, "-") for u, n in notes.items()}
    lines = [f"utt_id\tstatus\tfallback\t{LIKELIHOOD}\traw\n"]
    lines += [f"{u}\t{status[u]}\t{fallback[u]}\t{sure[u]}\t{' '.join(raw[u].split())}\n" for u in sorted(texts)]
    status_file = dump_dir / f"{text_name}.status.tsv"
    write_text(status_file, "".join(lines))
    report = {**summarise(status, fallback), **({LIKELIHOOD: likely} if (likely := likelihood(notes.values())) else {})}
    if data.text:
        rates = word_error_rate(data.text, texts)
        report = {"wer": rates["wer"], "wer_raw": word_error_rate(data.text, raw)["wer"], **report, "errors": rates}
    write_json(dump_dir / f"{text_name}.quality.json", report)
    write_table(data.path / text_name, texts)
    _report(data.path / text_name, name, report, status_file)


def without_speech(status_file: Path) -> frozenset[str]:
    """The utterances of a ``<text>.status.tsv`` in which no speech was found; none where there is no such file."""
    if not status_file.is_file():
        return frozenset()
    rows = (line.split("\t") for line in status_file.read_text(encoding="utf-8").splitlines()[1:])
    return frozenset(row[0] for row in rows if row[1:2] == [NO_SPEECH])


def _report(text_file: Path, name: str, report: dict[str, Any], status_file: Path) -> None:
    """A line on the screen, and a warning when many simulated transcripts failed."""
    counts = ", ".join(f"{v} {k}" for k, v in report["counts"].items() if v)
    wer = f"WER {100 * report['wer']:.1f}%, " if report.get("wer") is not None else ""
    print(f"{text_file}: {wer}{report['n']} utterances: {counts}")
    failed = report["n"] - sum(report["counts"][s] for s in ("ok", "limit", NO_SPEECH))
    if name == "text_sim" and failed > 0.1 * report["n"]:
        log.warning(
            "%d of %d simulated transcripts are refusals, repeats or empty; see %s. Check that prompt, projector and "
            "LLM belong together",
            failed,
            report["n"],
            status_file,
        )
