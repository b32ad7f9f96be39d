"""Write the mini corpus's Kaldi data directories data/{pretrain,train,valid,test}; pretrain is sound and text only."""

from __future__ import annotations

from collections.abc import Sequence

from sdumc.cli import Parser, run


def get_parser() -> Parser:
    parser = Parser(__doc__)
    group = parser.add_argument_group("input and output")
    group.add_argument("--corpus-dir", required=True, help="folder that make_corpus.py wrote")
    group.add_argument("--data-dir", required=True, help="folder of the sets")
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    args = get_parser().parse_args(argv)
    from pathlib import Path

    from mini.corpus import read_corpus
    from mini.plan import PRETRAIN, SETS
    from sdumc.data.kaldi_dir import finish_kaldi_dir
    from sdumc.data.tables import write_table

    for name in SETS:
        rows = read_corpus(args.corpus_dir, name)
        folder = Path(args.data_dir) / name
        folder.mkdir(parents=True, exist_ok=True)
        clips = {row.utt: str(row.clip) for row in rows}
        write_table(folder / "wav.scp", clips)
        write_table(folder / "text", {row.utt: row.text for row in rows})
        write_table(folder / "utt2spk", {row.utt: row.speaker for row in rows})
        if name != PRETRAIN:
            write_table(folder / "video.scp", clips)
            write_table(folder / "utt2label", {row.utt: f"{row.label:.4f}" for row in rows})
        finish_kaldi_dir(folder)
        print(f"{folder}: {len(rows)} utterances, {len({row.speaker for row in rows})} speakers")
    return None


if __name__ == "__main__":
    run(main)
