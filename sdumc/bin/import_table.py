"""Stage 1: data directories from a CSV or TSV file with a line a clip, and its media files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdumc.cli import Parser, run, setup_logging
from sdumc.corpora.importing import add_output_options, import_corpus
from sdumc.errors import UserError


def get_parser() -> Parser:
    parser = Parser(
        "Write DATA_DIR/{train,valid,test} from a table with a line a clip. Its columns are known by their names:\n"
        "path (media file, with or without extension) or video_id and clip_id (Raw/<video_id>/<clip_id>.mp4), label,\n"
        "and optionally text, speaker, split (train, valid, test), label_T, label_A, label_V, annotation;\n"
        "docs/new_recipe.md has the other names. Without split, speakers are shared out. What is left out is listed\n"
        "in DATA_DIR/<set>/dropped.tsv."
    )
    group = parser.add_argument_group("corpus")
    group.add_argument("--table", required=True, metavar="FILE", help="CSV (comma or semicolon) or TSV, UTF-8")
    group.add_argument(
        "--media-dir",
        metavar="DIR",
        help="where the media files are; by default the folder of the table, and Raw/ in it",
    )
    group.add_argument(
        "--no-media", action="store_true", help="there are texts and labels alone; needs no column of files or ids"
    )
    group.add_argument(
        "--columns", default="", metavar="PAIRS", help="columns of other names: 'media=clip label=\"mean rating\"'"
    )
    group.add_argument(
        "--label-map",
        default="",
        metavar="PAIRS",
        help="labels of words or classes: 'negative=-1 neutral=0 positive=1'; they are then the classes too",
    )
    add_output_options(parser, dump=False, counts="none", label_scale=True)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logging(args.verbose)
    from sdumc.corpora.table import parse_label_map, parse_pairs, read_table_corpus
    from sdumc.scale import parse_scale

    if args.no_media and args.media_dir:
        raise UserError("--media-dir and --no-media exclude each other")
    columns, label_map = parse_pairs(args.columns, "--columns"), parse_label_map(args.label_map)
    scale = parse_scale(args.label_scale, label_map) if args.label_scale else None
    media_dir = Path(args.media_dir) if args.media_dir else None
    import_corpus(
        lambda: read_table_corpus(Path(args.table), media_dir, columns, scale, label_map, args.no_media),
        args,
    )


if __name__ == "__main__":
    run(main)
