#!/usr/bin/env python3
"""Check Kaldi data directories and print every problem found; the exit code is 1 when there is any.

Each directory needs wav.scp and utt2spk; video.scp, text, utt2label, segments, spk2utt and utt2dur are checked when
they are there. Media files are opened too: missing, empty and truncated ones are found here and not hours later.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdumc.cli import Parser, run
from sdumc.errors import EXIT_USER_ERROR, UserError


def get_parser() -> Parser:
    parser = Parser(__doc__ or "")
    group = parser.add_argument_group("what is checked")
    group.add_argument("data_dir", nargs="+", help="such as data/train")
    group.add_argument("--no-media", action="store_true", help="do not open the media files")
    group.add_argument(
        "--label-range", nargs=2, type=float, metavar=("LOW", "HIGH"), help="labels allowed; as scale.yaml says"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    from sdumc.data.kaldi_dir import load_kaldi_dir, validate_kaldi_dir

    label_range = (args.label_range[0], args.label_range[1]) if args.label_range else None
    failed = False
    for path in args.data_dir:
        problems: list[object] = []
        try:
            problems += validate_kaldi_dir(path, check_media=not args.no_media, label_range=label_range)
        except UserError as e:  # the directory or one of its tables cannot be read
            problems.append(e)
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        if problems:
            failed = True
            print(f"{path}: NOT valid: {len(problems)} problems", file=sys.stderr)
        else:
            data = load_kaldi_dir(path, label_range)
            print(f"{path}: valid, {len(data.utterances)} utterances of {len(set(data.utt2spk.values()))} speakers")
    return EXIT_USER_ERROR if failed else 0


if __name__ == "__main__":
    run(main)
