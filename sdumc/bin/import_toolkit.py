"""Stage 1: a feature pickle of the field's common toolkit (such as unaligned_50.pkl) into dump folders."""

from __future__ import annotations

from collections.abc import Sequence

from sdumc.cli import Parser, run, setup_logging
from sdumc.conditions import MODALITIES
from sdumc.corpora.importing import add_media_options, add_output_options, import_corpus


def get_parser() -> Parser:
    parser = Parser(
        "Write DUMP_DIR/{train,valid,test} with the pickle's audio, text and video features at true length, and\n"
        "DATA_DIR/<set> with texts, labels and, when media are given too, wav.scp and video.scp for stages 2, 3.\n"
        "The pickle is read by a restricted unpickler: it can hold arrays and plain containers only."
    )
    group = parser.add_argument_group("corpus")
    group.add_argument("--pickle", required=True, metavar="FILE", help="unaligned_50.pkl or aligned_50.pkl")
    group.add_argument("--sha256", metavar="HEX", help="what the file's SHA-256 has to be; it is shown in any case")
    group.add_argument(
        "--features",
        nargs="+",
        choices=MODALITIES,
        default=list(MODALITIES),
        metavar="NAME",
        help="features to take from the pickle",
    )
    add_media_options(group)
    add_output_options(parser, label_scale=True)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logging(args.verbose)
    from sdumc.corpora.toolkit import read_toolkit
    from sdumc.scale import parse_scale

    scale = parse_scale(args.label_scale or "cmu")

    import_corpus(
        lambda: read_toolkit(args.pickle, args.features, args.counts, args.sha256, args.corpus_dir, args.media, scale),
        args,
    )


if __name__ == "__main__":
    run(main)
