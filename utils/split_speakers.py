#!/usr/bin/env python3
"""Divide a data directory into parts with other speakers: split_speakers.py --data-dir DIR --parts N FILE

FILE gets a line `utterance part` for each utterance, sorted; parts count from 1. A speaker (utt2spk) is in one part
only, and the parts have about equally many transcribed utterances (text). With fewer speakers than N there are as many
parts as speakers. Where all is of one speaker, the parts are of utterances. The result depends on the two tables, N and
--seed alone. FILE is left alone if it would not change.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections.abc import Collection, Mapping
from pathlib import Path


def divide(speakers: Mapping[str, str], transcribed: Collection[str], parts: int, seed: int) -> dict[str, int]:
    """The part, from 1, of each utterance of ``speakers`` (utterance -> speaker).

    The speaker with the most transcribed utterances comes first, chance decides between equals, and each goes to the
    part that has the fewest of them so far.
    """
    groups: dict[str, list[str]] = {}
    for utt in sorted(speakers):
        groups.setdefault(speakers[utt], []).append(utt)
    if sum(any(u in transcribed for u in utts) for utts in groups.values()) < 2:
        groups = {utt: [utt] for utt in sorted(speakers)}
    sizes = {name: sum(u in transcribed for u in utts) for name, utts in groups.items()}
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda name: -sizes[name])
    filled = [0] * max(1, min(parts, sum(size > 0 for size in sizes.values())))
    part_of = {}
    for name in order:
        part = filled.index(min(filled))
        filled[part] += sizes[name]
        part_of.update(dict.fromkeys(groups[name], part + 1))
    return dict(sorted(part_of.items(), key=lambda item: item[0].encode()))


def read(path: Path) -> dict[str, str]:
    """A table `utterance value`; ends the program if it cannot be read."""
    try:
        rows = (line.partition(" ") for line in path.read_text(encoding="utf-8").splitlines())
        return {utt: value.strip() for utt, _, value in rows}
    except (OSError, UnicodeDecodeError) as e:
        raise SystemExit(f"split_speakers.py: error: {path}: {e}") from None


def describe(speakers: Mapping[str, str], transcribed: Collection[str], part_of: Mapping[str, int]) -> str:
    """What the parts are made of, in a line; and a warning where one of them is most of the set."""
    sizes = [
        sum(p == part and u in transcribed for u, p in part_of.items()) for part in range(1, max(part_of.values()) + 1)
    ]
    of = len(set(speakers.values()))
    line = f"{len(speakers)} utterances of {of} speakers, transcribed ones by part: {' '.join(map(str, sizes))}"
    if of == 1:
        line += "\nall are of one speaker: the parts are of utterances"
    elif of == len(speakers):
        line += "\neach utterance has a speaker of its own: the parts are of utterances"
    if len(sizes) > 1 and max(sizes) > sum(sizes) / 2:
        line += (
            f"\nwarning: one part has {max(sizes)} of {sum(sizes)} utterances: little is left to learn from without it"
        )
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, type=Path, metavar="DIR", help="such as data/train")
    parser.add_argument("--parts", required=True, type=int, metavar="N", help="at most so many parts")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="another number gives other parts (1)")
    parser.add_argument("output", type=Path, metavar="FILE")
    args = parser.parse_args()
    speakers, transcribed = read(args.data_dir / "utt2spk"), read(args.data_dir / "text")
    if lost := sorted(
        {*(u for u, speaker in speakers.items() if not speaker), *(transcribed.keys() - speakers.keys())}
    ):
        sys.exit(
            f"split_speakers.py: error: {args.data_dir}/utt2spk: utterance {lost[0]!r} has no speaker; add it, or "
            "leave such utterances out: utils/fix_data_dir.py"
        )
    if not speakers:
        sys.exit(f"split_speakers.py: error: {args.data_dir}/utt2spk: empty")
    part_of = divide(speakers, transcribed, args.parts, args.seed)
    print(describe(speakers, transcribed, part_of))
    content = "".join(f"{utt} {part}\n" for utt, part in part_of.items())
    if args.output.is_file() and args.output.read_text(encoding="utf-8") == content:
        return
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_name(f".{args.output.name}.new")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, args.output)


if __name__ == "__main__":
    main()
