"""Stage 2: text simulated from sound alone, transcripts and their hidden states, for one shard of a data directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdumc.cli import (
    Parser,
    add_job_options,
    add_reader_options,
    add_rescoring_options,
    add_speech_test_option,
    add_state_options,
    at_least,
    run,
    setup_logging,
)


def get_parser() -> Parser:
    parser = Parser(
        "Let the speech LLM (frozen encoder, projector, frozen LLM) write a transcript of each clip of a shard by beam "
        "search,\nand keep the hidden states of what it wrote; `sdumc.bin.finish_dump --name text_sim` then joins the "
        "shards.\nRefusals, endless repeats and empty answers are found, counted and replaced: see the documentation."
    )
    add_job_options(parser, "text_sim")
    group = parser.add_argument_group("models")
    add_reader_options(group, required=True)
    group.add_argument("--llm", required=True, metavar="DIR", help="causal LLM: a transformers folder")
    add_state_options(parser)
    group = parser.add_argument_group("search")
    group.add_argument("--beam", type=at_least(1, int), default=4, metavar="N", help="hypotheses kept at each step")
    group.add_argument("--max-new-tokens", type=at_least(1, int), default=200, metavar="N", help="longest answer")
    group.add_argument("--length-penalty", type=float, default=1.0, metavar="X", help="score is divided by length**X")
    add_rescoring_options(parser)
    group = parser.add_argument_group("failures")
    group.add_argument(
        "--asr-text",
        metavar="FILE",
        help="transcripts read in place of a refusal or an empty answer; default DATA_DIR/text_asr if there is one",
    )
    add_speech_test_option(group)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logging(args.verbose)
    from sdumc.data.tables import read_table
    from sdumc.extraction.finishing import without_speech
    from sdumc.extraction.loop import data_hash, load_job, load_reader, load_rescorer, open_shard, sound_batches
    from sdumc.extraction.simulation import Search, extract_simulated_text
    from sdumc.pretrained.speech import projector_data

    data, utterances = load_job(args)
    asr_file = Path(args.asr_text) if args.asr_text else Path(args.data_dir) / "text_asr"
    asr_texts = read_table(asr_file, allow_empty=True) if args.asr_text or asr_file.is_file() else {}
    status_file = Path(args.dump_dir) / "text_asr.status.tsv"
    reader, settings = load_reader(args, data)
    rescorer, rescoring = load_rescorer(args)
    settings = {
        "extractor": "text_sim",
        **settings,
        **projector_data(args.projector, [] if args.projector_folds else data.utterances),
        "context": "audio+prompt",
        "beam": args.beam,
        "max_new_tokens": args.max_new_tokens,
        "length_penalty": args.length_penalty,
        **rescoring,
        "speech_test": args.speech_test,
        "data_hash": data_hash(data, asr_file, status_file),
    }
    with open_shard(args, settings, utterances) as writer:
        extract_simulated_text(
            data,
            sound_batches(args, data, utterances, reader),
            reader,
            writer,
            asr_texts,
            Search(args.beam, args.max_new_tokens, args.length_penalty, rescorer, args.rescore_weight),
            args.first_state == "keep",
            args.bad_media,
            without_speech(status_file),
            args.speech_test,
        )


if __name__ == "__main__":
    run(main)
