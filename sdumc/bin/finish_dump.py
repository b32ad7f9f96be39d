"""Stages 2 and 3: join the shards of a feature, write its index, transcripts and quality report."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from sdumc.cli import Parser, at_least, run, setup_logging
from sdumc.conditions import TRANSCRIPTS
from sdumc.errors import UserError

log = logging.getLogger("sdumc")

BAD_MEDIA = "bad_media"  # the note of an utterance whose media could not be read: why


def get_parser() -> Parser:
    parser = Parser(
        "Join the shards that --num-jobs jobs of extract_*, simulate_text or recognize wrote: DUMP_DIR/NAME.scp and "
        ".frames, .yaml, .absent;\nfor transcripts also DATA_DIR/text_sim or text_asr and DUMP_DIR/*.quality.json. "
        "utt2label and utt2spk are copied to DUMP_DIR."
    )
    group = parser.add_argument_group("shards")
    group.add_argument("--data-dir", required=True, metavar="DIR", help="Kaldi data directory")
    group.add_argument("--dump-dir", required=True, metavar="DIR", help="where the shards are")
    group.add_argument("--name", required=True, help="feature: audio, text, text_sim, text_asr, video; asr_hyp for ASR")
    group.add_argument(
        "--num-jobs", type=at_least(1, int), default=1, metavar="N", help="how many shards there must be"
    )
    group.add_argument(
        "--max-drop",
        type=float,
        default=0.01,
        metavar="X",
        help="largest share of utterances (0-1) whose media could not be read (--bad-media absent)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logging(args.verbose)
    from sdumc.data.ark import merge_shards
    from sdumc.data.kaldi_dir import load_kaldi_dir

    if not 0 <= args.max_drop <= 1:
        raise UserError(f"--max-drop {args.max_drop}: a share between 0 and 1")
    data_dir, dump_dir = Path(args.data_dir), Path(args.dump_dir)
    data = load_kaldi_dir(data_dir)
    meta = _manifest(dump_dir / "ark" / f"{args.name}.1.json")["settings"]  # merge_shards checks that all agree
    recogniser = dump_dir / "ark" / "asr_hyp.1.json"
    if args.name == "text_sim" and recogniser.is_file() and (data_dir / "text_asr").is_file():
        asr = _manifest(recogniser)
        meta["asr"] = {
            **asr["settings"],
            "versions": asr["versions"],
        }  # whose transcripts replaced refusals and empty answers
    for name in ("utt2label", "utt2spk"):  # before the index: whoever sees the index finds them too
        if (data_dir / name).is_file():
            _copy(data_dir / name, dump_dir / name)
    merged = merge_shards(
        dump_dir, args.name, args.num_jobs, meta, data.utterances, lambda m: _check_media(args.name, m, args.max_drop)
    )
    if args.name in TRANSCRIPTS:
        _finish_transcripts(args.name, data, dump_dir, merged)
    if merged.absent and not merged.frames:
        log.warning("%s: absent in all %d utterances", dump_dir / f"{args.name}.scp", len(merged.absent))
    elif merged.frames:
        log.info(
            "%s: %d utterances, %d frames, %d dimensions, %d absent",
            dump_dir / f"{args.name}.scp",
            len(merged.frames),
            sum(merged.frames.values()),
            merged.dim,
            len(merged.absent),
        )


def _check_media(name: str, merged, max_drop: float) -> None:
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


def _manifest(path: Path) -> dict:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {"settings": manifest["settings"], "versions": manifest.get("versions", {})}
    except FileNotFoundError:
        raise UserError(f"{path}: not there; run the jobs of this feature first") from None
    except (ValueError, KeyError):
        raise UserError(f"{path}: damaged; remove it and run its job again") from None


def _copy(source: Path, target: Path) -> None:
    from sdumc.files import atomic_write

    if target.is_file() and target.read_bytes() == source.read_bytes():
        return  # its time stays, too: recipes see from that whether training has to be done again
    with open(source, "rb") as f, atomic_write(target, "wb") as g:
        shutil.copyfileobj(f, g)


def _finish_transcripts(name: str, data, dump_dir: Path, merged) -> None:
    """Write DATA_DIR/<text file>, DUMP_DIR/<text file>.status.tsv and .quality.json from the shards' notes."""
    from sdumc.data.tables import write_table
    from sdumc.files import write_json, write_text
    from sdumc.pretrained.quality import summarise, word_error_rate

    text_name = TRANSCRIPTS[name]
    texts = {u: merged.notes.get(u, {}).get("hyp", "") for u in data.utterances}
    raw = {u: merged.notes.get(u, {}).get("raw", texts[u]) for u in texts}
    status = {u: merged.notes.get(u, {}).get("status", "empty") for u in texts}
    fallback = {u: merged.notes.get(u, {}).get("fallback", "none") for u in texts}
    lines = ["utt_id\tstatus\tfallback\traw\n"]
    lines += [f"{u}\t{status[u]}\t{fallback[u]}\t{' '.join(raw[u].split())}\n" for u in sorted(texts)]
    write_text(dump_dir / f"{text_name}.status.tsv", "".join(lines))
    report = summarise(status, fallback)
    if data.text:
        rates = word_error_rate(data.text, texts)
        report = {"wer": rates["wer"], "wer_raw": word_error_rate(data.text, raw)["wer"], **report, "errors": rates}
    write_json(dump_dir / f"{text_name}.quality.json", report)
    write_table(data.path / text_name, texts)
    counts = ", ".join(f"{v} {k}" for k, v in report["counts"].items() if v)
    wer = f"WER {100 * report['wer']:.1f}%, " if report.get("wer") is not None else ""
    print(f"{data.path / text_name}: {wer}{report['n']} utterances: {counts}")
    failed = report["n"] - report["counts"]["ok"] - report["counts"]["limit"]
    if name == "text_sim" and failed > 0.1 * report["n"]:
        log.warning(
            "%d of %d simulated transcripts are refusals, repeats or empty; see %s. Check that prompt, projector and "
            "LLM belong together",
            failed,
            report["n"],
            dump_dir / f"{text_name}.status.tsv",
        )


if __name__ == "__main__":
    run(main)
