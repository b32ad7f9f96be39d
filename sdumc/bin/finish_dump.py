"""Stages 2 and 3: join the shards of a feature, write its index, transcripts and quality report."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from sdumc.cli import Parser, at_least, run, setup_logging
from sdumc.errors import UserError

log = logging.getLogger("sdumc")


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
    from sdumc.data.kaldi_dir import load_kaldi_dir
    from sdumc.extraction.finishing import finish

    if not 0 <= args.max_drop <= 1:
        raise UserError(f"--max-drop {args.max_drop}: a share between 0 and 1")
    dump_dir = Path(args.dump_dir)
    merged = finish(load_kaldi_dir(args.data_dir), dump_dir, args.name, args.num_jobs, args.max_drop)
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


if __name__ == "__main__":
    run(main)
