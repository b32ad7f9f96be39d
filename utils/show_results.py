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

MEASURES = ("mae", "corr", "acc7", "acc2_has0", "acc2_non0")
WIDTHS = (7, 7, 7, 10, 10)


def table(decoded: Path) -> str:
    """The scores of one decoded set.

    Raises:
        UserError: a score.json cannot be read, or has no such measure.
    """
    header = "".join(f" {name:>{width}}" for name, width in zip(MEASURES, WIDTHS, strict=True))
    lines = [str(decoded), f"  {'condition':<12}{header} {'n':>5}"]
    for path in sorted(decoded.glob("*/score.json"), key=lambda p: by_condition(p.parent.name)):
        score = read_json(path, "run stage 5 again")
        try:
            cells = ["-" if score[m] is None else f"{score[m]:.3f}" for m in MEASURES]
            n = score["n"]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"{path}: not a score; run stage 5 again") from None
        row = "".join(f" {cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
        lines.append(f"  {path.parent.name:<12}{row} {n:>5}")
    return "\n".join(lines)


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
