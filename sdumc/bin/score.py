"""Score predictions: MAE, correlation, 7/5/3/2-class accuracy and weighted F1."""

from __future__ import annotations

from collections.abc import Sequence

from sdumc.cli import Parser, run
from sdumc.errors import UserError


def get_parser() -> Parser:
    parser = Parser(
        "Score a predictions.tsv (header utt_id<TAB>prediction<TAB>label) and write the measures as JSON.\n"
        "docs/metrics.md defines each of them. Accuracies and F1 are fractions of 1."
    )
    group = parser.add_argument_group("files")
    group.add_argument("--predictions", required=True, metavar="FILE", help="predictions.tsv as decoding writes it")
    group.add_argument("--output", required=True, metavar="FILE", help="score.json to write")
    group.add_argument(
        "--reference",
        metavar="FILE",
        help="utt2label with exactly the utterances that must be there; a missing or extra one is an error",
    )
    group = parser.add_argument_group("measures")
    group.add_argument(
        "--rounding",
        choices=("half-even", "away"),
        default="half-even",
        help="how a number becomes a class for acc7, acc5, acc3: to the nearest integer with .5 to the even one, or "
        "away from zero as in the CMU SDK's rule",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    from sdumc.files import write_json
    from sdumc.scoring.metrics import read_predictions, score

    table = read_predictions(args.predictions)
    if args.reference:
        check_reference(table, args.reference)
    measures = score(table.predictions, table.labels, args.rounding)
    write_json(args.output, measures)
    print(summary(measures))


def check_reference(table, path: str) -> None:
    """Refuse predictions whose utterances or labels are not those of the ``utt2label`` file ``path``."""
    from sdumc.data.tables import read_table

    reference = read_table(path)
    have = dict(zip(table.ids, table.labels.tolist(), strict=True))
    missing = [utt for utt in reference if utt not in have]
    extra = [utt for utt in have if utt not in reference]
    if missing:
        raise UserError(
            f"{table.path}: {len(missing)} of the {len(reference)} utterances of {path} are missing, "
            f"the first is {missing[0]}; a score without them would be for another set: decode again"
        )
    if extra:
        raise UserError(
            f"{table.path}: {len(extra)} utterances are not in {path}, the first is {extra[0]}; "
            "decode the set that the reference belongs to"
        )
    for utt, text in reference.items():
        try:
            label = float(text)
        except ValueError:
            raise UserError(f"{path}: utterance {utt}: the label is not a number: {text!r}") from None
        if not abs(label - have[utt]) <= 1e-4:
            raise UserError(f"{table.path}: utterance {utt} has the label {have[utt]:g}, but {text} in {path}")


def summary(measures: dict) -> str:
    """One line for people: ``n 80  mae 0.512  corr 0.871 ...``; undefined values as ``-``."""
    from sdumc.scoring.metrics import MEASURES

    shown = [f"n {measures['n']}"]
    for key in MEASURES:
        value = measures[key]
        shown.append(f"{key} -" if value != value else f"{key} {value:.4f}")
    return "  ".join(shown)


if __name__ == "__main__":
    run(main)
