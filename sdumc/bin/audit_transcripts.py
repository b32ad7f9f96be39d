"""Compare transcripts with recognised speech: a ranked list of clips, and the videos whose times are likely wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdumc.cli import Parser, run, setup_logging


def get_parser() -> Parser:
    parser = Parser(
        "Compare DATA_DIR/text with what a recogniser heard in the same clips (DATA_DIR/text_asr, from stage 2).\n"
        "Writes OUTPUT_DIR/audit.tsv (clips, worst first) and OUTPUT_DIR/videos.tsv (a line a video with a verdict)."
    )
    group = parser.add_argument_group("input and output")
    group.add_argument("--data-dir", required=True, metavar="DIR", help="data directory with text and text_asr")
    group.add_argument("--hypotheses", metavar="FILE", help="recognised text; DATA_DIR/text_asr by default")
    group.add_argument("--output-dir", required=True, metavar="DIR", help="where the lists are written")
    group = parser.add_argument_group("what is suspicious (all three must hold)")
    group.add_argument("--max-wer", type=float, default=0.8, metavar="X", help="word error rate above this")
    group.add_argument(
        "--min-overlap", type=float, default=0.4, metavar="X", help="overlap of letter triples below this"
    )
    group.add_argument("--min-words", type=int, default=3, metavar="N", help="at least so many words in the transcript")
    group = parser.add_argument_group("leaving the suspicious clips out (the originals stay as they are)")
    group.add_argument("--clean-data-dir", metavar="DIR", help="a new data directory without them")
    group.add_argument("--dump-dir", metavar="DIR", help="features of the same set ...")
    group.add_argument("--clean-dump-dir", metavar="DIR", help="... and the new dump folder without them")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logging(args.verbose)
    from sdumc.corpora.audit import compare, leave_out, ranked_table, video_table
    from sdumc.data.tables import read_table
    from sdumc.errors import UserError
    from sdumc.files import write_text

    if bool(args.dump_dir) != bool(args.clean_dump_dir):
        raise UserError("--dump-dir and --clean-dump-dir need each other")
    data_dir, output_dir = Path(args.data_dir), Path(args.output_dir)
    asr = Path(args.hypotheses) if args.hypotheses else data_dir / "text_asr"
    if not asr.exists():
        raise UserError(f"{asr}: not there; stage 2 with --asr-model makes it")
    findings = compare(
        read_table(data_dir / "text"),
        read_table(asr, allow_empty=True),
        read_table(data_dir / "utt2spk"),
        args.max_wer,
        args.min_overlap,
        args.min_words,
    )
    videos, bad_videos = video_table(findings)
    write_text(output_dir / "audit.tsv", ranked_table(findings))
    write_text(output_dir / "videos.tsv", videos)
    suspicious = [f for f in findings if f.suspicious]
    moved = sum(bool(f.fits) for f in suspicious)
    print(
        f"{data_dir}: {len(suspicious)} of {len(findings)} clips are suspicious; {moved} of these fit another "
        f"clip; {len(bad_videos)} of {len({f.speaker for f in findings})} videos are so in at least half of their clips"
    )
    for video, verdict in bad_videos[:10]:
        print(f"  {video}: {verdict}")
    print(f"  lists: {output_dir / 'audit.tsv'}, {output_dir / 'videos.tsv'}")
    reasons = {f.utt: f"word error rate {f.wer:.2f}, overlap {f.overlap:.2f}" for f in suspicious}
    for folder, target in ((args.data_dir, args.clean_data_dir), (args.dump_dir, args.clean_dump_dir)):
        if folder and target:
            kept = leave_out(Path(folder), Path(target), reasons)
            print(f"  {target}: {kept} utterances, {len(reasons)} left out (listed in its dropped.tsv)")


if __name__ == "__main__":
    run(main)
