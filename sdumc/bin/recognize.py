"""Stage 2: transcripts by a speech recogniser (CTC or Whisper) for one shard of a data directory."""

from __future__ import annotations

from collections.abc import Sequence

from sdumc.cli import Parser, at_least, run, setup_logging
from sdumc.extraction.jobs import add_job_options


def get_parser() -> Parser:
    parser = Parser(
        "Transcribe a shard of a data directory with a CTC model (greedy) or Whisper (greedy, 30 s windows), chosen by "
        "the folder's config.json;\n`sdumc.bin.finish_dump --name asr_hyp` then writes DATA_DIR/text_asr."
    )
    add_job_options(parser, "asr_hyp")
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="DIR", help="recogniser: a transformers folder")
    group.add_argument("--language", default="en", help="of the speech, for multilingual Whisper")
    group.add_argument(
        "--max-new-tokens", type=at_least(1, int), default=200, metavar="N", help="Whisper's longest answer per window"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logging(args.verbose)
    from sdumc.device import pick_device
    from sdumc.extraction.jobs import data_hash, durations, load_job, make_batches, open_shard
    from sdumc.extraction.transcripts import recognise_shard
    from sdumc.pretrained.folders import DTYPES, fingerprint
    from sdumc.pretrained.recogniser import load_recogniser

    data, utterances = load_job(args)
    recogniser = load_recogniser(
        args.model, DTYPES[args.dtype], pick_device(args.device), args.language, args.max_new_tokens
    )
    settings = {
        "extractor": "asr",
        "recogniser": recogniser.kind,
        "model": args.model,
        "model_hash": fingerprint(recogniser.folder),
        "language": args.language,
        "max_new_tokens": args.max_new_tokens,
        "dtype": args.dtype,
        "data_hash": data_hash(data),
    }
    batches = make_batches(durations(data, utterances), args.batch_size, args.batch_seconds)
    with open_shard(args, settings, utterances) as writer:
        recognise_shard(data, batches, recogniser, writer, args.bad_media)


if __name__ == "__main__":
    run(main)
