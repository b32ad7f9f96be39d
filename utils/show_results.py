#!/usr/bin/env python3
"""Usage: utils/show_results.sh [exp/train_seed1/decode_test ...]

Prints the scores of decoded sets, a line for each condition; of all sets below exp/ when no folder is named.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdumc.conditions import by_condition
from sdumc.errors import EXIT_USER_ERROR, UserError
from sdumc.files import read_json
from sdumc.scale import CMU, from_dict, mapping_in_words

LEFT_OUT = ("ccc", "acc5", "acc3", "f1_has0", "f1_non0")  # on CMU's scale, so that a line fits the screen


def table(decoded: Path) -> str:
    """The scores of one decoded set.

    Raises:
        UserError: a score.json cannot be read, or has no such measure.
    """
    lines: list[str] = []
    for path in sorted(decoded.glob("*/score.json"), key=lambda p: by_condition(p.parent.name)):
        score = read_json(path, "run stage 5 again")
        try:
            scale = from_dict(score.get("scale", CMU.as_dict()), path)
            names = [m for m in scale.measures if scale.scheme != "cmu" or m not in LEFT_OUT]
            cells = ["-" if score[m] is None else f"{score[m]:.3f}" for m in names]
            n = score["n"]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(f"{path}: not a score; run stage 5 again") from None
        widths = [max(7, len(name) + 1) for name in names]
        if not lines:
            header = "".join(f" {name:>{width}}" for name, width in zip(names, widths, strict=True))
            about = f"labels from {scale.ends}"
            if mapped := score.get("mapped_from"):
                about += f"; {mapping_in_words(mapped, scale)}"
            lines = [f"{decoded}  ({about})", f"  {'condition':<12}{header} {'n':>5}"]
        row = "".join(f" {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        lines.append(f"  {path.parent.name:<12}{row} {n:>5}")
    return "\n".join(lines or [str(decoded), "  nothing is scored"])


def main(argv: list[str]) -> int:
    if argv[:1] in (["--help"], ["-h"]):
        print((__doc__ or "").strip())
        return 0
    folders = [Path(word) for word in argv] or sorted(Path("exp").glob("*/decode_*"))
    if not folders:
        print("show_results.sh: nothing is decoded yet: there is no exp/*/decode_*", file=sys.stderr)
        return EXIT_USER_ERROR
    try:
        for folder in folders:
            print(table(folder))
    except UserError as e:
        print(f"show_results.sh: error: {e}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
