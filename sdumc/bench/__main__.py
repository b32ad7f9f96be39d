"""Measure SDUMC against the plain way of the same work.

    python -m sdumc.bench                 every part
    python -m sdumc.bench step contrast   some

Figures depend on the machine and on what else it does; compare ratios. The exit code is 1 when a goal is missed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from sdumc.cli import Parser, at_least, run

PARTS = ("step", "contrast", "simulation", "loader", "extraction", "neighbours", "predict")


def get_parser() -> Parser:
    parser = Parser(__doc__ or "")
    group = parser.add_argument_group("what is measured")
    group.add_argument("part", nargs="*", help=f"of {', '.join(PARTS)}; all without a word")
    group.add_argument("--repeats", type=at_least(1, int), default=7, help="interleaved repeats of each side")
    group = parser.add_argument_group("simulation")
    group.add_argument(
        "--llm", metavar="DIR", help="a real LLM's folder; default: random weights of SmolLM2-135M's size"
    )
    group = parser.add_argument_group("loader")
    group.add_argument(
        "--utterances", type=at_least(1, int), default=2000, help="of the generated corpus; 2000 are 6.8 GB"
    )
    group.add_argument("--dir", metavar="DIR", help="where the corpus is generated (default: the temporary folder)")
    group.add_argument("--keep", action="store_true", help="leave the corpus in --dir, or use the one that is there")
    group.add_argument("--workers", type=at_least(0, int), default=2, help="threads that read")
    group = parser.add_argument_group("predict")
    group.add_argument("--exp-dir", metavar="MODEL", help="a trained model's folder or a pack")
    group.add_argument("--clip", metavar="FILE", help="a recording of some seconds, of which copies are scored")
    group.add_argument(
        "--clips", type=at_least(1, int), default=500, metavar="N", help="how many (default: %(default)s)"
    )
    group.add_argument("--minutes", type=float, default=60.0, help="of the long recording made of it (%(default)g)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    if unknown := [p for p in args.part if p not in PARTS]:
        print(f"error: no part {unknown[0]!r}; the parts are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    from sdumc.bench import contrast, extraction, loader, neighbours, predict, simulation, step
    from sdumc.bench.measure import machine

    measure: dict[str, Callable[[int], bool]] = {
        "step": step.main,
        "contrast": contrast.main,
        "simulation": lambda repeats: simulation.main(repeats, args.llm),
        "loader": lambda repeats: loader.main(repeats, args.utterances, args.dir, args.keep, args.workers),
        "extraction": extraction.main,
        "neighbours": neighbours.main,
        "predict": lambda repeats: predict.main(repeats, args.exp_dir, args.clip, args.clips, args.minutes),
    }
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # of models that the parts write to load them again
    print(machine())
    reached = True
    for part in args.part or PARTS:
        print(f"\n## {part}\n", flush=True)
        reached = measure[part](args.repeats) and reached
    return 0 if reached else 1


if __name__ == "__main__":
    run(main)
