"""Stage 1: data directories from the raw videos, transcripts, labels and official folds of CMU-MOSEI or CMU-MOSI."""

from __future__ import annotations

from collections.abc import Sequence

from sdumc.cli import Parser, run, setup_logging
from sdumc.corpora.importing import add_media_options, add_output_options, import_corpus


def get_parser() -> Parser:
    parser = Parser(
        "Write DATA_DIR/{train,valid,test}, Kaldi data directories whose `segments` cut clips out of the original "
        "files,\nand DATA_DIR/folds.txt, what was found per fold. What is left out is listed in "
        "DATA_DIR/<set>/dropped.tsv\nwith its reason; videos of no fold in DATA_DIR/dropped.tsv."
    )
    group = parser.add_argument_group("corpus")
    add_media_options(group, required=True)
    group.add_argument(
        "--folds",
        required=True,
        metavar="PATH",
        help="folder of train.txt, valid.txt, test.txt (a video id a line), or the CMU SDK's cmu_mosei_std_folds.py",
    )
    group.add_argument(
        "--labels", metavar="PATH", help="CSV file or folder of them, or a .csd file; Raw/Labels by default"
    )
    add_output_options(parser, dump=False)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logging(args.verbose)
    from sdumc.corpora.raw import read_raw

    import_corpus(lambda: read_raw(args.corpus_dir, args.folds, args.labels, args.media), args)


if __name__ == "__main__":
    run(main)
