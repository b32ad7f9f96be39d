"""Stage 1: the features, labels and transcripts that the SDUMC authors share, into dump folders."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from sdumc.cli import Parser, run, setup_logging
from sdumc.corpora.options import add_output_options

log = logging.getLogger("sdumc")


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
    from sdumc.corpora.authors import FOLDERS, import_feature, list_features, read_corpus
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
    from sdumc.data.dump import load_dump
    from sdumc.data.kaldi_dir import append_dropped, write_table
    from sdumc.errors import UserError

    if args.num_jobs < 1:
        raise UserError("--num-jobs must be at least 1")
    data_dir, dump_dir, root = Path(args.data_dir), Path(args.dump_dir), Path(args.features_dir)
    (data_dir / SUMMARY).unlink(missing_ok=True)  # an older one says nothing about this run
    folds, names = read_corpus(Path(args.labels), Path(args.transcripts) if args.transcripts else None)
    check_disjoint(folds.values())
    folders = {name: root / getattr(args, f"{name}_folder") for name in FOLDERS}
    present = {name: list_features(folder) for name, folder in folders.items() if folder.is_dir()}
    if not present:
        raise UserError(f"{root}: has none of the folders {', '.join(f.name for f in folders.values())}")
    notes = [f"{name}: left out, there is no {folders[name]}" for name in folders if name not in present]

    for fold in folds.values():
        for utt in list(fold.label):
            if not any(names[fold.name][utt] in found for found in present.values()):
                fold.drop(utt, "label without a single feature file")
    used = {theirs for files in names.values() for theirs in files.values()}
    surplus = {
        n: f"feature file without a label ({name})" for name, found in present.items() for n in found.keys() - used
    }
    (data_dir / DROPPED).unlink(missing_ok=True)
    if surplus:
        append_dropped(data_dir / DROPPED, [(n, STAGE, reason) for n, reason in surplus.items()])
        notes.append(f"{len(surplus)} names of feature files have no label ({data_dir / DROPPED})")
    for fold in folds.values():
        write_dropped(data_dir / fold.name / DROPPED, fold)
    write_summary(data_dir, list(folds.values()), args.counts, notes)
    for fold in folds.values():
        check_share(fold, args.max_drop, data_dir / fold.name / DROPPED)

    for fold in folds.values():
        folder, tables = dump_dir / fold.name, plain_tables(fold)
        write_set(data_dir / fold.name, tables)
        forget_features(folder, present)
        files = {utt: names[fold.name][utt] for utt in fold.label}
        for table in ("utt2spk", "utt2label"):
            write_table(folder / table, tables[table])
        for name, found in present.items():
            merged = import_feature(name, folders[name], found, files, folder, args.num_jobs, args.max_drop)
            if merged.absent:
                first, reason = next(iter(merged.absent.items()))
                fold.notes.append(f"{name}: {len(merged.absent)} utterances have none, such as {first}: {reason}")
        load_dump(folder, list(present), require=("utt2label",))
    write_summary(data_dir, list(folds.values()), args.counts, notes)
    print((data_dir / SUMMARY).read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    run(main)
