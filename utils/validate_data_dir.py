#!/usr/bin/env python3
"""Check Kaldi data directories and print every problem found; the exit code is 1 when there is any.

Each directory needs wav.scp and utt2spk; video.scp, text, utt2label, segments, spk2utt and utt2dur are checked when
they are there. Media files are opened too: missing, empty and cut short ones are found here and not hours later.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("data_dir", nargs="+", help="such as data/train")
    parser.add_argument("--no-media", action="store_true", help="do not open the media files")
    parser.add_argument(
        "--label-range", nargs=2, type=float, default=(-3.0, 3.0), metavar=("LOW", "HIGH"), help="labels allowed (-3 3)"
    )
    args = parser.parse_args()
    from sdumc.data.kaldi_dir import load_kaldi_dir, validate_kaldi_dir
    from sdumc.errors import UserError

    label_range = (args.label_range[0], args.label_range[1])
    failed = False
    for path in args.data_dir:
        problems: list[object] = []
        try:
            problems += validate_kaldi_dir(path, check_media=not args.no_media, label_range=label_range)
        except UserError as e:  # nothing there that can be read
            problems.append(e)
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        if problems:
            failed = True
            print(f"{path}: NOT valid: {len(problems)} problems", file=sys.stderr)
        else:
            data = load_kaldi_dir(path, label_range)
            print(f"{path}: valid, {len(data.utterances)} utterances of {len(set(data.utt2spk.values()))} speakers")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
