#!/usr/bin/env python3
"""Sort the tables of a Kaldi data directory and keep the utterances that are whole in all of them.

Every utterance left out is a line (id, stage, reason) of dropped.tsv. When more than --max-drop of them would have to
go, the directory is left as it is and the exit code is 1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdumc.cli import Parser, run


def get_parser() -> Parser:
    parser = Parser(__doc__ or "")
    group = parser.add_argument_group("what is fixed")
    group.add_argument("data_dir", help="such as data/train")
    group.add_argument("--max-drop", type=float, default=0.01, help="largest share that may be left out")
    group.add_argument("--dropped", metavar="FILE", help="the list of what was left out (DATA_DIR/dropped.tsv)")
    group.add_argument("--no-media", action="store_true", help="do not open the media files")
    group.add_argument(
        "--label-range", nargs=2, type=float, metavar=("LOW", "HIGH"), help="labels allowed; as scale.yaml says"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = get_parser()
    args = parser.parse_args(argv)
    if not 0 <= args.max_drop <= 1:
        parser.error(f"--max-drop {args.max_drop}: a share between 0 and 1")
    from sdumc.data.kaldi_dir import fix_kaldi_dir, load_kaldi_dir

    dropped = args.dropped or Path(args.data_dir) / "dropped.tsv"
    label_range = (args.label_range[0], args.label_range[1]) if args.label_range else None
    rows = fix_kaldi_dir(args.data_dir, dropped, args.max_drop, check_media=not args.no_media, label_range=label_range)
    kept = len(load_kaldi_dir(args.data_dir, label_range).utterances)
    for utt, _, reason in rows:
        print(f"left out: {utt}: {reason}", file=sys.stderr)
    print(f"{args.data_dir}: kept {kept} utterances, left out {len(rows)}" + (f", see {dropped}" if rows else ""))


if __name__ == "__main__":
    run(main)
