"""Pack a trained model with all that it needs to score a clip on another machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdumc.cli import Parser, add_checkpoint_option, log, run, setup_logging
from sdumc.errors import UserError


def get_parser() -> Parser:
    parser = Parser(
        "Pack a trained model, its settings, the pretrained models of its extractors and a model card into one folder "
        "or archive,\nwhich `sdumc predict --exp-dir` and `sdumc.Scorer.load` take on any machine."
    )
    group = parser.add_argument_group("input and output")
    group.add_argument("--exp-dir", required=True, metavar="DIR", help="folder that training wrote")
    group.add_argument(
        "--output", required=True, metavar="PATH", help="folder to make, or archive: a name in .tar, .tar.gz or .tgz"
    )
    add_checkpoint_option(group)
    group = parser.add_argument_group("pretrained models")
    group.add_argument(
        "--no-backbones",
        action="store_true",
        help="leave the pretrained models out, but for the projector, and refer to them by their names on the hub",
    )
    group.add_argument(
        "--hub-names",
        nargs="+",
        default=[],
        metavar="FOLDER=OWNER/NAME",
        help="for --no-backbones: the hub name of a model folder that does not know its own",
    )
    group.add_argument("--model-dir", metavar="DIR", help="folder that holds the pretrained models, if they were moved")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logging(args.verbose)
    hub_names = {}
    for pair in args.hub_names:
        folder, sign, name = pair.partition("=")
        if not (folder and sign) or name.count("/") != 1:
            raise UserError(f"--hub-names {pair}: expected FOLDER=OWNER/NAME, e.g. wavlm-large=microsoft/wavlm-large")
        hub_names[folder] = name
    if hub_names and not args.no_backbones:
        raise UserError("--hub-names is for --no-backbones")
    from sdumc.prediction.package import pack

    output = Path(args.output)
    pack(
        Path(args.exp_dir),
        output,
        checkpoint=args.checkpoint,
        backbones=not args.no_backbones,
        hub_names=hub_names,
        model_dir=Path(args.model_dir) if args.model_dir else None,
    )
    files = [output] if output.is_file() else [p for p in output.rglob("*") if p.is_file()]
    log.info("%s: %.1f MB; score with: sdumc predict --exp-dir %s CLIP", output, _megabytes(files), output)
    if output.is_dir():
        log.info("to publish it: hf upload OWNER/%s %s", output.name, output)


def _megabytes(files: Sequence[Path]) -> float:
    return sum(p.stat().st_size for p in files) / 1e6


if __name__ == "__main__":
    run(main)
