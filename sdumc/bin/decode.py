"""Predict sentiment with a trained model under one or more conditions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdumc.cli import Parser, at_least, log, run, setup_logging
from sdumc.conditions import CONDITIONS
from sdumc.device import add_device_option, pick_device


def get_parser() -> Parser:
    """Options of decoding."""
    width = max(map(len, CONDITIONS))
    conditions = [f"  {c.name:{width}}  {c.given}" for c in CONDITIONS.values()]
    parser = Parser("\n".join([__doc__ or "", "", "conditions:", *conditions]))
    g = parser.add_argument_group("input and output")
    g.add_argument("--exp-dir", required=True, metavar="DIR", help="folder that training wrote")
    g.add_argument("--data-dir", required=True, metavar="DIR", help="dump folder to score")
    g.add_argument("--condition", required=True, nargs="+", choices=CONDITIONS, metavar="NAME", help="see above")
    g.add_argument(
        "--output-dir",
        required=True,
        metavar="DIR",
        help="gets predictions.tsv and, for the report, internals.npz and attention.npz (of the worst and some other "
        "utterances); with several conditions, DIR/<condition>/ does",
    )
    g.add_argument(
        "--checkpoint", choices=("valid-best", "averaged"), default="valid-best", help="both were chosen on valid"
    )
    g = parser.add_argument_group("running")
    add_device_option(g)
    g.add_argument(
        "--batch-size", type=at_least(1, int), default=64, help="utterances at once; no effect on predictions"
    )
    g.add_argument("--num-workers", type=at_least(0, int), default=2, help="threads that read features ahead")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logging(args.verbose)
    from sdumc.scoring.attention import attend, worth_keeping
    from sdumc.scoring.attention_file import write_attention
    from sdumc.scoring.decoding import decode, inputs_for, load_for, write_decoded
    from sdumc.training.experiment import load_model

    device = pick_device(args.device)
    model = load_model(Path(args.exp_dir), args.checkpoint).to(device)
    dump = load_for(Path(args.data_dir), args.condition)
    for condition in args.condition:
        if condition == "missing" and "text_sim" not in inputs_for(condition, dump):
            log.warning("%s has no text_sim: missing means the same as none here", args.data_dir)
        features = [dump.features[f].entries for f in inputs_for(condition, dump).values()]
        if empty := [utt for utt in dump.utterances if not any(utt in entries for entries in features)]:
            log.warning(
                "%d utterances have none of the modalities of condition %s, the first: %s; the model is given "
                "nothing for them, so their predictions mean nothing",
                len(empty),
                condition,
                empty[0],
            )
        decoded = decode(model, dump, condition, device, batch_size=args.batch_size, num_workers=args.num_workers)
        folder = Path(args.output_dir) / (condition if len(args.condition) > 1 else "")
        write_attention(attend(model, dump, condition, worth_keeping(decoded), device), folder)
        write_decoded(decoded, folder)
        log.info("%s: %d utterances (%s) -> %s", condition, len(decoded.ids), CONDITIONS[condition].given, folder)


if __name__ == "__main__":
    run(main)
