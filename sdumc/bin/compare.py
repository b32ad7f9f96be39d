"""One table of several experiments: a measure per condition, mean and spread over seeds.

    python -m sdumc.bin.compare --experiments exp/train exp/without_mia --output ABLATION.md

Each experiment is the path of its exp folders without `_seed<N>`; the first is what the others are compared with.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from sdumc.cli import Parser, run
from sdumc.conditions import CONDITIONS
from sdumc.errors import UserError
from sdumc.files import read_json
from sdumc.reporting.markdown import markdown_table
from sdumc.scoring.metrics import MEASURES

_LOWER_IS_BETTER = ("mae",)


def get_parser() -> Parser:
    parser = Parser(__doc__ or "")
    group = parser.add_argument_group("what is compared")
    group.add_argument("--experiments", nargs="+", required=True, metavar="EXP", help="exp folders without _seed<N>")
    group.add_argument("--test-set", default="test", help="set whose scores are shown")
    group.add_argument(
        "--conditions",
        nargs="+",
        choices=CONDITIONS,
        default=["full", "missing", "none"],
        metavar="NAME",
        help="a column each",
    )
    group.add_argument("--measure", choices=MEASURES, default="mae", metavar="NAME", help="a measure of score.json")
    group = parser.add_argument_group("output")
    group.add_argument("--title", default="Comparison", help="heading of the table")
    group.add_argument("--output", metavar="FILE.md", help="also write the table here")
    return parser


def collect(experiment: str, test_set: str, condition: str, measure: str) -> dict[int, float]:
    """The measure by seed.

    Raises:
        UserError: no seed is there, or one was not decoded under the condition.
    """
    base = Path(experiment)
    folders = {}
    for path in base.parent.glob(f"{base.name}_seed*"):
        if match := re.fullmatch(re.escape(base.name) + r"_seed(\d+)", path.name):
            folders[int(match[1])] = path
    if not folders:
        raise UserError(f"{experiment}_seed*: no such experiment; train it with `run.sh --exp-tag {base.name}`")
    values = {}
    for seed, folder in sorted(folders.items()):
        file = folder / f"decode_{test_set}" / condition / "score.json"
        try:
            values[seed] = read_json(file, f"run stage 5 with --conditions {condition}")[measure]
        except (KeyError, TypeError):
            raise UserError(f"{file}: not a score file; run stage 5 again") from None
        if values[seed] is None:
            raise UserError(f"{file}: {measure} is undefined there; compare another measure")
    return values


def make_table(args) -> str:
    """The comparison as Markdown."""
    header = ["experiment", *args.conditions, "seeds"]
    rows = []
    reference: dict[str, float] = {}
    for experiment in args.experiments:
        cells, seeds = [], 0
        for condition in args.conditions:
            values = list(collect(experiment, args.test_set, condition, args.measure).values())
            mean = statistics.mean(values)
            text = f"{mean:.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")
            if condition in reference:
                text += f" ({mean - reference[condition]:+.4f})"
            else:
                reference[condition] = mean
            cells.append(text)
            seeds = len(values)
        rows.append([Path(experiment).name.replace("_", " "), *cells, str(seeds)])
    better = "lower" if args.measure in _LOWER_IS_BETTER else "higher"
    return (
        f"# {args.title}\n\n{args.measure.upper()} on {args.test_set} ({better} is better), mean ± standard deviation "
        f"over seeds; in brackets the difference from `{Path(args.experiments[0]).name}`.\n\n"
        f"{markdown_table(header, rows)}\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    text = make_table(args)
    print(text, end="")
    if args.output:
        from sdumc.files import write_text

        write_text(args.output, text)


if __name__ == "__main__":
    run(main)
