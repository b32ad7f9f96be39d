"""Measure SDUMC against the plain way of the same work.

    python -m sdumc.bench                 every part
    python -m sdumc.bench step contrast   some

Figures depend on the machine and on what else it does; compare ratios.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sdumc.bench import contrast, simulation, step
from sdumc.bench.measure import machine
from sdumc.cli import Parser, run

PARTS = {"step": step.main, "contrast": contrast.main, "simulation": simulation.main}


def get_parser() -> Parser:
    parser = Parser(__doc__ or "")
    parser.add_argument("part", nargs="*", help=f"of {', '.join(PARTS)}; all without a word")
    parser.add_argument("--repeats", type=int, default=7, help="interleaved repeats of each side")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    if unknown := [p for p in args.part if p not in PARTS]:
        print(f"error: no part {unknown[0]!r}; the parts are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    print(machine())
    for part in args.part or PARTS:
        print(f"\n## {part}\n", flush=True)
        PARTS[part](args.repeats)
    return 0


if __name__ == "__main__":
    run(main)
