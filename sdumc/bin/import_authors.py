"""Stage 1: the features, labels and transcripts that the SDUMC authors share, into dump folders."""

from __future__ import annotations

from collections.abc import Sequence

from sdumc.cli import Parser, run, setup_logging
from sdumc.corpora.importing import add_output_options, import_corpus


def get_parser() -> Parser:
    from sdumc.corpora.authors import FOLDERS

    parser = Parser(
        "Write DUMP_DIR/{train,valid,test} from folders of .npy files (one an utterance, T x D) as float32 archives,\n"
        "and texts and labels to DATA_DIR/<set>. The label file is read by a restricted unpickler."
    )
    group = parser.add_argument_group("corpus")
    group.add_argument("--features-dir", required=True, metavar="DIR", help="the folder that holds the feature folders")
    group.add_argument("--labels", required=True, metavar="FILE", help="label_official.npz")
    group.add_argument("--transcripts", metavar="FILE", help="CSV table with the columns name, english")
    for name, folder in FOLDERS.items():
        group.add_argument(
            f"--{name.replace('_', '-')}-folder", default=folder, metavar="NAME", help=f"{name} features"
        )
    group = add_output_options(parser)
    group.add_argument("--num-jobs", type=int, default=4, metavar="N", help="processes that convert")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logging(args.verbose)
    from sdumc.corpora.authors import FOLDERS, read_authors

    folders = {name: getattr(args, f"{name}_folder") for name in FOLDERS}
    import_corpus(
        lambda: read_authors(
            args.features_dir, args.labels, args.transcripts, folders, args.num_jobs, max_absent=args.max_drop
        ),
        args,
    )


if __name__ == "__main__":
    run(main)
