"""Transcripts against recognised speech of the same clips: find clips whose times in the corpus are wrong.

A clip is suspicious by two measures together, since either alone misleads: the word error rate is high for other
spellings too, and the overlap of letter triples is high for any two texts of common words.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdumc.data.tables import append_dropped, read_table, write_table
from sdumc.errors import UserError
from sdumc.files import write_text
from sdumc.pretrained.quality import normalise

_NEIGHBOUR_GAIN = 0.3  # overlap by which another clip's transcript must fit better than the clip's own


@dataclass(frozen=True)
class Finding:
    """One utterance: word error rate, overlap (0-1), transcript's and recogniser's number of words.

    ``suspicious`` says that both measures are beyond their limits. ``fits`` is the utterance of the same video whose
    transcript the recogniser's words fit far better, or empty.
    """

    utt: str
    speaker: str
    wer: float
    overlap: float
    words: int
    heard: int
    suspicious: bool
    fits: str
    text: str
    hypothesis: str


def triples(text: str) -> Counter[str]:
    """Letter triples of a text without its spaces; a text of fewer letters is one piece."""
    letters = text.replace(" ", "")
    if len(letters) < 3:
        return Counter([letters] if letters else [])
    return Counter(letters[i : i + 3] for i in range(len(letters) - 2))


def overlap(a: Counter[str], b: Counter[str]) -> float:
    """Dice's coefficient of two bags of triples: 0 nothing in common, 1 the same; 1 for two empty ones."""
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 1.0


def compare(
    texts: Mapping[str, str],
    hypotheses: Mapping[str, str],
    utt2spk: Mapping[str, str],
    max_wer: float = 0.8,
    min_overlap: float = 0.4,
    min_words: int = 3,
) -> list[Finding]:
    """Compare every transcript with what a recogniser heard, worst first.

    Args:
        texts, hypotheses: by utterance; a hypothesis may be empty.
        utt2spk: the source video of each utterance.
        max_wer, min_overlap: an utterance is suspicious when its word error rate is above the one and its overlap below
            the other.
        min_words: transcripts of fewer words are never suspicious: "yeah." occurs anywhere.

    Raises:
        UserError: the tables are of different utterances.
    """
    import jiwer

    if texts.keys() != hypotheses.keys():
        odd = sorted(texts.keys() ^ hypotheses.keys())
        raise UserError(
            f"utterance {odd[0]!r} and {len(odd) - 1} more are in one of the two texts only; run stage 2 again"
        )
    plain = {u: (normalise(texts[u]), normalise(hypotheses[u])) for u in texts}
    bags = {u: (triples(a), triples(b)) for u, (a, b) in plain.items()}
    by_speaker: dict[str, list[str]] = {}
    for utt in sorted(texts):
        by_speaker.setdefault(utt2spk.get(utt, utt), []).append(utt)
    findings = []
    for speaker, utterances in by_speaker.items():
        for utt in utterances:
            reference, heard = plain[utt]
            words = len(reference.split())
            wer = jiwer.wer(reference, heard) if reference else float(bool(heard))
            own = overlap(*bags[utt])
            suspicious = words >= min_words and wer > max_wer and own < min_overlap
            fits = ""
            if suspicious and heard:
                others = [(overlap(bags[o][0], bags[utt][1]), o) for o in utterances if o != utt]
                best, other = max(others, default=(0.0, ""))
                if best > own + _NEIGHBOUR_GAIN:
                    fits = other
            findings.append(
                Finding(
                    utt, speaker, wer, own, words, len(heard.split()), suspicious, fits, texts[utt], hypotheses[utt]
                )
            )
    return sorted(findings, key=lambda f: (not f.suspicious, f.overlap, -f.wer, f.utt))


def ranked_table(findings: Iterable[Finding]) -> str:
    """``audit.tsv``: an utterance a line, worst first."""
    lines = ["utt_id\tvideo\tsuspicious\twer\toverlap\twords\theard\tfits_better\ttranscript\trecognised\n"]
    for f in findings:
        numbers = f"{f.wer:.3f}\t{f.overlap:.3f}\t{f.words}\t{f.heard}"
        suspicious = "yes" if f.suspicious else "no"
        lines.append(f"{f.utt}\t{f.speaker}\t{suspicious}\t{numbers}\t{f.fits or '-'}\t{f.text}\t{f.hypothesis}\n")
    return "".join(lines)


def video_table(findings: Sequence[Finding]) -> tuple[str, list[tuple[str, str]]]:
    """``videos.tsv``, a video a line, worst first; and (video, what is likely wrong) of those with half their clips
    suspicious.
    """
    by_video: dict[str, list[Finding]] = {}
    for f in findings:
        by_video.setdefault(f.speaker, []).append(f)
    rows = []
    for video, found in by_video.items():
        bad = [f for f in found if f.suspicious]
        moved = sum(bool(f.fits) for f in bad)
        silent = sum(f.heard == 0 for f in bad)
        if not bad:
            verdict = "fine"
        elif 2 * len(bad) >= len(found) and len(found) > 1:
            verdict = "times wrong throughout" if 2 * moved < len(bad) else "times moved against the text"
        else:
            verdict = "some clips wrong"
        if bad and silent == len(bad):
            verdict = "nothing heard: no speech, or another language"
        median = statistics.median(f.wer for f in found)
        rows.append((len(bad) / len(found), len(bad), len(found), median, moved, silent, video, verdict))
    rows.sort(key=lambda r: (-r[0], -r[1], r[6]))
    lines = ["video\tclips\tsuspicious\tshare\tmedian_wer\tfit_another_clip\tnothing_heard\tverdict\n"]
    for share, suspicious, clips, median, moved, silent, video, verdict in rows:
        lines.append(f"{video}\t{clips}\t{suspicious}\t{share:.2f}\t{median:.3f}\t{moved}\t{silent}\t{verdict}\n")
    return "".join(lines), [(r[6], r[7]) for r in rows if r[0] >= 0.5]


def leave_out(folder: Path, target: Path, gone: Mapping[str, str]) -> int:
    """Copy a data directory's or dump folder's tables without some utterances; archives and media are not copied.

    Args:
        folder: ``data/<set>`` or ``dump/<set>``.
        target: the new folder; its ``dropped.tsv`` lists the utterances with their reasons.
        gone: utterance -> reason.

    Returns:
        How many utterances the new folder has.

    Raises:
        UserError: the target is the folder itself, or nothing would be left.
    """
    if target.resolve() == folder.resolve():
        raise UserError(f"{target}: give another folder than {folder}; the original stays as it is")
    # Not the lists and counts (.tsv, .json) of what happened to the original set.
    files = [f for f in folder.iterdir() if f.is_file() and f.suffix in ("", ".scp", ".frames", ".absent", ".yaml")]
    tables = {f.name: read_table(f, allow_empty=True) for f in files if f.suffix != ".yaml" and f.name[0] != "."}
    recordings = {v.split()[0] for u, v in tables.get("segments", {}).items() if u not in gone}
    for name, table in tables.items():
        if name in ("wav.scp", "video.scp") and "segments" in tables:
            tables[name] = {r: path for r, path in table.items() if r in recordings}
        elif name == "spk2utt":
            left = {s: [u for u in utts.split() if u not in gone] for s, utts in table.items()}
            tables[name] = {s: " ".join(utts) for s, utts in left.items() if utts}
        else:
            tables[name] = {u: value for u, value in table.items() if u not in gone}
    kept = len(tables.get("utt2label") or tables.get("utt2spk") or {})
    if not kept:
        raise UserError(f"{target}: no utterance would be left; give limits that are not as strict")
    for file in files:
        if file.suffix == ".yaml":
            write_text(target / file.name, file.read_text(encoding="utf-8"))
    for name in sorted(tables, key=lambda name: name.endswith(".scp")):  # an index is the sign that all else is there
        # The index of a feature that all others lack is empty.
        if tables[name] or (name.endswith(".scp") and tables.get(f"{name[:-4]}.absent")):
            write_table(target / name, tables[name])
        else:
            (target / name).unlink(missing_ok=True)
    (target / "dropped.tsv").unlink(missing_ok=True)
    append_dropped(target / "dropped.tsv", [(u, "audit", reason) for u, reason in gone.items()])
    return kept
