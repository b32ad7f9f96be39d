"""Stage 1: a feature pickle of the field's common toolkit (unaligned_50.pkl, aligned_50.pkl) into dump folders."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from sdumc.cli import Parser, run, setup_logging
from sdumc.corpora.options import add_media_options, add_output_options

log = logging.getLogger("sdumc")


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
        choices=("audio", "text", "video"),
        default=["audio", "text", "video"],
        metavar="NAME",
        help="features to take from the pickle",
    )
    add_media_options(group)
    add_output_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logging(args.verbose)
    from sdumc.corpora import raw
    from sdumc.corpora.sets import (
        DROPPED,
        STAGE,
        SUMMARY,
        check_disjoint,
        check_share,
        forget_features,
        plain_tables,
        write_dropped,
        write_set,
        write_summary,
    )
    from sdumc.corpora.toolkit import describe_sha256, read_pickle, sha256, write_feature
    from sdumc.data.dump import load_dump
    from sdumc.data.kaldi_dir import append_dropped, write_table

    path, data_dir, dump_dir = Path(args.pickle), Path(args.data_dir), Path(args.dump_dir)
    (data_dir / SUMMARY).unlink(missing_ok=True)  # an older one says nothing about this run
    digest = sha256(path)
    identity = describe_sha256(path, digest, args.sha256, args.counts)
    log.info("%s", identity)
    parts = read_pickle(path)
    folds = [part.fold for part in parts.values()]
    check_disjoint(folds)
    notes = [identity]
    if args.corpus_dir:
        root = raw.raw_root(args.corpus_dir)
        media = raw.find_media(root, args.media)
        clips = {}
        if not media.segmented:
            transcripts = raw.read_transcripts(root)
            if any(math.isnan(clip.end) for video in transcripts.clips.values() for clip in video.values()):
                raw.give_times(transcripts, raw.read_labels(raw.find_labels(root)))
            clips = transcripts.clips
        notes.append(f"media: {'a file a clip' if media.segmented else 'clips are cut from whole videos'} of {root}")
    sets = {}
    for name, part in parts.items():
        fold = part.fold
        if args.corpus_dir:
            sources = {}
            for utt in list(fold.label):
                video, clip = part.clips[utt]
                source = raw.locate(clips.get(video, {}).get(clip), video, clip, media)
                if isinstance(source, str):
                    fold.drop(utt, source)
                elif not fold.text[utt]:
                    fold.drop(utt, "empty transcript")
                else:
                    sources[utt] = source
            raw.drop_broken_media(data_dir / f".{name}.partial", fold, sources, media.segmented)
            sets[name] = raw.media_tables(fold, sources, media.segmented)
        else:
            sets[name] = plain_tables(fold)
        write_dropped(data_dir / name / DROPPED, fold)
    (data_dir / DROPPED).unlink(missing_ok=True)
    if args.corpus_dir and (unused := raw.unused_media(media)):
        append_dropped(data_dir / DROPPED, [(stem, STAGE, "media without a label in the pickle") for stem in unused])
        notes.append(f"{len(unused)} media files belong to no utterance, such as {unused[0]} ({data_dir / DROPPED})")
    write_summary(data_dir, folds, args.counts, notes)
    for fold in folds:
        check_share(fold, args.max_drop, data_dir / fold.name / DROPPED)

    for name, part in parts.items():
        write_set(data_dir / name, sets[name])
        folder = dump_dir / name
        forget_features(folder, args.features)
        tables = plain_tables(part.fold)
        for table in ("utt2spk", "utt2label"):
            write_table(folder / table, tables[table])
        for feature in args.features:
            part.fold.notes += write_feature(path, part, feature, folder, digest)
        load_dump(folder, args.features, require=("utt2label",))
    write_summary(data_dir, folds, args.counts, notes)
    print((data_dir / SUMMARY).read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    run(main)
