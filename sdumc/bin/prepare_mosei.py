"""Stage 1: data directories from the raw videos, transcripts, labels and official folds of CMU-MOSEI or CMU-MOSI."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from sdumc.cli import Parser, run, setup_logging
from sdumc.corpora.options import add_media_options, add_output_options

log = logging.getLogger("sdumc")


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
    from sdumc.corpora.folds import read_folds
    from sdumc.corpora.raw import (
        collect_fold,
        drop_broken_media,
        find_labels,
        find_media,
        give_times,
        media_tables,
        raw_root,
        read_labels,
        read_transcripts,
        strays,
    )
    from sdumc.corpora.sets import (
        DROPPED,
        STAGE,
        SUMMARY,
        check_share,
        write_dropped,
        write_set,
        write_summary,
    )
    from sdumc.data.kaldi_dir import append_dropped

    root, data_dir = raw_root(args.corpus_dir), Path(args.data_dir)
    (data_dir / SUMMARY).unlink(missing_ok=True)  # an older one says nothing about this run
    members = read_folds(args.folds)
    labels = read_labels(args.labels or find_labels(root))
    transcripts = read_transcripts(root)
    give_times(transcripts, labels)
    media = find_media(root, args.media)
    log.info("%s: %d transcripts, %d videos", root, len(transcripts.clips), len(media.video))

    folds, tables = [], {}
    for name, videos in members.items():
        fold, sources = collect_fold(name, videos, transcripts, labels, media)
        if labels.by_time and not fold.label and any(len(labels.by_time.get(v, ())) for v in videos):
            log.warning("%s: not one label row has the times of a transcript clip", name)
        drop_broken_media(data_dir / f".{name}.partial", fold, sources, media.segmented)
        tables[name] = media_tables(fold, sources, media.segmented)
        write_dropped(data_dir / name / DROPPED, fold)
        folds.append(fold)

    assigned = {v for videos in members.values() for v in videos}
    (data_dir / DROPPED).unlink(missing_ok=True)
    rows = [(name, STAGE, reason) for name, reason in strays(assigned, transcripts, labels, media).items()]
    if rows:
        append_dropped(data_dir / DROPPED, rows)
    notes = [*labels.notes, f"media: {'a file a clip' if media.segmented else 'clips are cut from whole videos'}"]
    if not media.has_video:
        notes.append("media: only sound; there is no folder of videos")
    if rows:
        notes.append(f"{len(rows)} videos or files belong to no fold ({data_dir / DROPPED})")
    write_summary(data_dir, folds, args.counts, notes)
    print((data_dir / SUMMARY).read_text(encoding="utf-8"), end="")
    for fold in folds:
        check_share(fold, args.max_drop, data_dir / fold.name / DROPPED)
    for fold in folds:
        write_set(data_dir / fold.name, tables[fold.name])


if __name__ == "__main__":
    run(main)
