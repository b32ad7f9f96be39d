"""One table of several experiments: a measure per condition, mean over seeds and differences, with 95% intervals.

    python -m sdumc.bin.compare --experiments exp/train exp/without_mia --output ABLATION.md

Each experiment is the path of its exp folders without `_seed<N>`; the first is what the others are compared with, on
the same utterances and seeds. docs/metrics.md tells how intervals are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdumc.cli import Parser, run
from sdumc.conditions import CONDITIONS
from sdumc.scoring.metrics import EVERY_MEASURE, LOWER_IS_BETTER


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
    group.add_argument(
        "--measure", choices=EVERY_MEASURE, default="mae", metavar="NAME", help="a measure of score.json"
    )
    group.add_argument(
        "--data-root", default="data", metavar="DIR", help="its <test-set>/utt2spk has the speakers to resample"
    )
    group = parser.add_argument_group("output")
    group.add_argument("--title", default="Comparison", help="heading of the table")
    group.add_argument("--output", metavar="FILE.md", help="also write the table here")
    return parser


def make_table(args) -> str:
    """The comparison as Markdown."""
    from sdumc.reporting.report import markdown_table
    from sdumc.reporting.scores import compare

    rows, notes = compare(args.experiments, args.conditions, args.measure, args.test_set, Path(args.data_root))
    better = "lower" if args.measure in LOWER_IS_BETTER else "higher"
    text = (
        f"# {args.title}\n\n{args.measure.upper()} on {args.test_set} ({better} is better), mean over seeds with its "
        f"95% interval; in brackets the difference from `{Path(args.experiments[0]).name}` on the same utterances, "
        "with its interval. It is called better or worse only where that interval leaves out 0.\n\n"
        f"{markdown_table(['experiment', *args.conditions, 'seeds'], rows)}\n\n"
    )
    return text + "".join(f"* {note}\n" for note in notes)


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    text = make_table(args)
    print(text, end="")
    if args.output:
        from sdumc.files import write_text

        write_text(args.output, text)


if __name__ == "__main__":
    run(main)
