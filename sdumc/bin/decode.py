"""Predict sentiment with a trained model, or the mean of several, under one or more conditions or protocols."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdumc.cli import Parser, add_checkpoint_option, at_least, log, run, setup_logging
from sdumc.conditions import CONDITIONS, MISSING_TEXTS, PROTOCOLS, SIMULATED, in_words
from sdumc.errors import UserError
from sdumc.machine import add_device_option, pick_device

if TYPE_CHECKING:
    from sdumc.data.dump import Dump
    from sdumc.model.network import SDUMC


def get_parser() -> Parser:
    """Options of decoding."""
    width = max(map(len, CONDITIONS))
    conditions = [f"  {c.name:{width}}  {c.given}" for c in CONDITIONS.values()]
    conditions.append(f"  {'':{width}}  (missing: the text that the model's missing flow was trained with)")
    protocols = [f"  {p.name:{width}}  {p.given}" for p in PROTOCOLS.values()]
    parser = Parser("\n".join([__doc__ or "", "", "conditions:", *conditions, "", "protocols:", *protocols]))
    g = parser.add_argument_group("input and output")
    g.add_argument(
        "--exp-dir",
        required=True,
        nargs="+",
        metavar="DIR",
        help="folder that training wrote; of several, such as those of all seeds, the predictions are averaged",
    )
    g.add_argument("--data-dir", required=True, metavar="DIR", help="dump folder to score")
    g.add_argument("--condition", default=[], nargs="+", choices=CONDITIONS, metavar="NAME", help="see above")
    g.add_argument(
        "--protocol",
        default=[],
        nargs="+",
        choices=PROTOCOLS,
        metavar="NAME",
        help="see above; then only this is decoded. Frames and modalities are taken from what --condition gives, full "
        "and missing by default. Writes DIR/<protocol>/protocol.yaml, .../<condition>[/<rate>]/predictions.tsv",
    )
    g.add_argument("--mask-seed", type=at_least(0, int), default=1, help="of what is lost; stored in masks.npz")
    g.add_argument(
        "--output-dir",
        required=True,
        metavar="DIR",
        help="gets predictions.tsv, condition.yaml (what was read) and, for the report, internals.npz and "
        "attention.npz (of the worst and some other utterances); with several conditions, DIR/<condition>/ does; of "
        "several models, predictions.tsv and condition.yaml only",
    )
    add_checkpoint_option(g)
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
    if not (args.condition or args.protocol):
        raise UserError("give --condition, or --protocol; --help lists both")
    from sdumc.data.dump import load_dump
    from sdumc.scale import mapped_from, mapping_in_words, scale_of
    from sdumc.scoring.decoding import check_dimensions, inputs_for, load_for
    from sdumc.training.checkpoint import load_model

    device = pick_device(args.device)
    models = {exp: load_model(Path(exp), args.checkpoint).to(device) for exp in args.exp_dir}
    scale = scale_of(args.data_dir)
    if theirs := mapped_from(models, scale):
        log.info("%s", mapping_in_words(theirs, scale))
    if args.protocol:
        whole = load_dump(args.data_dir)
        check_dimensions(models, whole)
        decode_protocols(models, whole, args)
        return
    missing_text = {model.config.missing_text for model in models.values()}
    dump = load_for(Path(args.data_dir), args.condition, missing_text)
    check_dimensions(models, dump)
    for condition in args.condition:
        for text in missing_text:
            warn_of_absent(dump, condition, text)
        folder = Path(args.output_dir) / (condition if len(args.condition) > 1 else "")
        count = decode_condition(models, dump, condition, folder, args.batch_size, args.num_workers)
        of = f", mean of {len(models)} models" if len(models) > 1 else ""
        reads = [inputs_for(condition, dump, m.available, m.config.missing_text).values() for m in models.values()]
        given = " or ".join(sorted({in_words(features) for features in reads}))
        log.info("%s: %d utterances (%s%s) -> %s", condition, count, given, of, folder)


def warn_of_absent(dump: Dump, condition: str, missing_text: str = SIMULATED) -> None:
    """Log what the dump lacks for the condition and a model whose missing flow reads ``missing_text``."""
    from sdumc.scoring.decoding import inputs_for

    inputs = inputs_for(condition, dump, missing_text=missing_text)
    wanted = MISSING_TEXTS[missing_text]
    if condition == "missing" and wanted and wanted not in inputs.values():
        log.warning("%s has no %s: missing means the same as none here", dump.path, wanted)
    features = [dump.features[f].entries for f in inputs.values()]
    if empty := [utt for utt in dump.utterances if not any(utt in entries for entries in features)]:
        log.warning(
            "%d utterances have none of the modalities of condition %s, the first: %s; the model is given "
            "nothing for them, so their predictions mean nothing",
            len(empty),
            condition,
            empty[0],
        )


def decode_protocols(models: Mapping[str, SDUMC], dump: Dump, args: Namespace) -> None:
    """Write what the models, by exp folder, predict under each protocol.

    Raises:
        UserError: the models read different modalities.
    """
    from sdumc.scoring.decoding import decode_protocol, protocol_conditions

    reads = {exp: f"{', '.join(m.available)} (missing: {m.config.missing_text})" for exp, m in models.items()}
    check_alike(reads, "--protocol")
    several = list(models.values())
    for protocol in args.protocol:
        missing_text = several[0].config.missing_text
        conditions = protocol_conditions(protocol, dump, several[0].available, args.condition, missing_text)
        for condition in conditions:
            warn_of_absent(dump, condition, missing_text)
        folder = Path(args.output_dir) / protocol
        decode_protocol(several, dump, protocol, conditions, folder, args.mask_seed, args.batch_size, args.num_workers)
        log.info("%s: %d utterances, from %s -> %s", protocol, len(dump.utterances), ", ".join(conditions), folder)


def check_alike(reads: Mapping[str, str], what: str) -> None:
    """Refuse models that read different features, given in words by exp folder."""
    if len(set(reads.values())) > 1:
        words = "; ".join(f"{exp} reads {names}" for exp, names in reads.items())
        raise UserError(f"{what}: {words}; only models of the same features can be averaged")


def decode_condition(
    models: Mapping[str, SDUMC], dump: Dump, condition: str, folder: Path, batch_size: int, num_workers: int
) -> int:
    """Write what the models, by exp folder, predict under one condition; returns the number of utterances.

    Raises:
        UserError: the models read different features.
    """
    from sdumc.scale import mapped_from
    from sdumc.scoring.attention import write_attention
    from sdumc.scoring.decoding import (
        attend,
        decode,
        inputs_for,
        mean_predictions,
        worth_keeping,
        write_condition,
        write_decoded,
        write_predictions,
    )

    reads = {
        exp: ", ".join(sorted(inputs_for(condition, dump, m.available, m.config.missing_text).values()))
        for exp, m in models.items()
    }
    check_alike(reads, f"condition {condition}")
    found = []
    for model in models.values():
        device = next(model.parameters()).device
        found.append(decode(model, dump, condition, device, batch_size=batch_size, num_workers=num_workers))
    mapped = mapped_from(models, dump.scale)
    write_condition(condition, model.config.missing_text, found[0].features, folder, mapped)
    if len(found) == 1:
        write_attention(attend(model, dump, condition, worth_keeping(found[0]), device), folder)
        write_decoded(found[0], folder)
    else:
        for name in ("internals.npz", "attention.npz"):  # of one model, decoded here earlier
            (folder / name).unlink(missing_ok=True)
        write_predictions(found[0].ids, mean_predictions(found), found[0].label, folder, dump.scale)
    return len(found[0].ids)


if __name__ == "__main__":
    run(main)
