"""Stage 3: text features, LLM hidden states at the tokens of given transcripts, for one shard of a data directory."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from sdumc.cli import Parser, add_job_options, add_reader_options, add_state_options, run, setup_logging


def get_parser() -> Parser:
    parser = Parser(
        "Read given transcripts (real ones, or ASR's) with the LLM and keep its hidden states, for a shard of a data "
        "directory;\n`sdumc.bin.finish_dump --name text` then joins the shards. By default everything but the words is "
        "as in the simulated text:\nthe same sound and prompt stand before them."
    )
    add_job_options(parser, "text")
    group = parser.add_argument_group("models")
    group.add_argument("--llm", required=True, metavar="DIR", help="causal LLM: a transformers folder")
    add_reader_options(group, required=False)
    group = parser.add_argument_group("text")
    group.add_argument("--text", metavar="FILE", help="Kaldi text file; default DATA_DIR/text")
    group.add_argument(
        "--context",
        choices=("audio+prompt", "prompt", "none"),
        default="audio+prompt",
        help="what stands before the words: sound and prompt as in simulated text, the prompt, or BOS only",
    )
    group.add_argument("--text-case", choices=("keep", "lower"), default="keep", help="change the words' case first")
    add_state_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logging(args.verbose)
    from sdumc.extraction.features import TextEncoder, extract_text
    from sdumc.extraction.loop import (
        data_hash,
        load_job,
        load_llm,
        load_reader,
        make_batches,
        open_shard,
        sound_batches,
    )

    data, utterances = load_job(args)
    text_file = Path(args.text or Path(args.data_dir, "text"))
    texts, without = _read_texts(args, text_file)
    reader = None
    if args.context == "audio+prompt":
        reader, settings = load_reader(args, data)
        llm = reader.llm
    else:
        llm, settings = load_llm(args)
    encoder = TextEncoder(llm, args.context, args.first_state == "keep", reader)
    settings = {
        "extractor": "text",
        **settings,
        "context": args.context,
        "text_case": args.text_case,
        "data_hash": data_hash(data, text_file),
    }
    if encoder.reads_sound:
        batches = sound_batches(args, data, utterances, reader)
    else:
        spoken = {u: float(len(texts.get(u, ""))) / 15 for u in utterances}  # as long as it takes to say them
        batches = make_batches(spoken, args.batch_size, args.batch_seconds)
    with open_shard(args, settings, utterances) as writer:
        extract_text(data, texts, batches, encoder, writer, args.bad_media, without)


def _read_texts(args: Namespace, text_file: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The words of the utterances, and of real text the reasons of those that have none."""
    from sdumc.data.kaldi_dir import TEXT_ABSENT
    from sdumc.data.tables import read_table

    texts = read_table(text_file, allow_empty=args.name != "text")
    if args.text_case == "lower":
        texts = {u: t.lower() for u, t in texts.items()}
    absent_file = text_file.with_name(TEXT_ABSENT)
    return texts, read_table(absent_file) if args.name == "text" and absent_file.is_file() else {}


if __name__ == "__main__":
    run(main)
