"""Score predictions: MAE, correlations, accuracies and weighted F1 by classes, with 95% intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdumc.cli import Parser, run
from sdumc.errors import UserError

if TYPE_CHECKING:
    from sdumc.scale import LabelScale


def get_parser() -> Parser:
    parser = Parser(
        "Score a predictions.tsv (header utt_id<TAB>prediction<TAB>label) and write the measures as JSON.\n"
        "docs/metrics.md defines each of them. Accuracies and F1 are fractions of 1.\n"
        "Each has a 95% interval: bootstrap over speakers, or over utterances without --utt2spk."
    )
    group = parser.add_argument_group("files")
    group.add_argument("--predictions", required=True, metavar="FILE", help="predictions.tsv as decoding writes it")
    group.add_argument("--output", required=True, metavar="FILE", help="score.json to write")
    group.add_argument(
        "--reference",
        metavar="FILE",
        help="utt2label with exactly the utterances that must be there; a missing or extra one is an error",
    )
    group.add_argument(
        "--utt2spk", metavar="FILE", help="speaker (or source video) of each utterance; intervals are over these"
    )
    group = parser.add_argument_group("measures")
    group.add_argument(
        "--label-scale",
        metavar="SCALE",
        help="scale of the labels: cmu, sims, or lowest and highest label and scheme of classes, as '1 5 nearest'; "
        "by default what scale.yaml beside the predictions says, else cmu",
    )
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
    from sdumc.data.tables import read_table
    from sdumc.files import read_yaml, write_json
    from sdumc.scale import MAPPED, parse_scale, scale_of
    from sdumc.scoring.metrics import clusters_of, read_predictions, score_with_intervals

    table = read_predictions(args.predictions)
    if args.reference:
        check_reference(table, args.reference)
    speakers = read_table(args.utt2spk) if args.utt2spk else {}
    clusters = clusters_of(table.ids, speakers, args.utt2spk)
    scale = parse_scale(args.label_scale) if args.label_scale else scale_of(Path(args.predictions).parent)
    measures = score_with_intervals(table.predictions, table.labels, clusters, args.rounding, scale)
    condition = Path(args.predictions).parent / "condition.yaml"
    if condition.is_file() and (mapped := read_yaml(condition).get(MAPPED)):
        measures["mapped_from"] = str(mapped)
    write_json(args.output, measures)
    print(summary(measures, scale))


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


def summary(measures: dict, scale: LabelScale) -> str:
    """Two lines for people: ``n 80  mae 0.5120 [0.47, 0.55] ...``, undefined values as ``-``, and how it was made."""
    shown = [f"n {measures['n']}"]
    for key in scale.measures:
        value, interval = measures[key], measures["intervals"][key]
        limits = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
        shown.append(f"{key} -" if value != value else f"{key} {value:.4f}{limits}")
    from sdumc.scale import mapping_in_words

    method = measures["interval_method"]
    made = f"labels from {scale.ends}; 95% intervals: bootstrap over {method['clusters']} {method['resampled']}"
    notes = list(method["notes"])
    if mapped := measures.get("mapped_from"):
        notes.append(mapping_in_words(mapped, scale))
    return "\n".join(["  ".join(shown), "; ".join([made, *notes])])


if __name__ == "__main__":
    run(main)
