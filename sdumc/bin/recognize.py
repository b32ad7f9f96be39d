"""Stage 2: transcripts by a speech recogniser (CTC or Whisper) for one shard of a data directory."""

from __future__ import annotations

from collections.abc import Sequence

from sdumc.cli import Parser, add_job_options, add_speech_test_option, at_least, run, setup_logging
from sdumc.conditions import ASR_SHARDS


def get_parser() -> Parser:
    parser = Parser(
        "Transcribe a shard of a data directory with a CTC model (greedy) or Whisper (with its tests for speech and "
        "repetition), chosen by the folder's config.json;\n`sdumc.bin.finish_dump "
        "--name asr_hyp` then writes DATA_DIR/text_asr."
    )
    add_job_options(parser, ASR_SHARDS, matrices=False)
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="DIR", help="recogniser: a transformers folder")
    group.add_argument("--language", default="en", help="of the speech, for multilingual Whisper")
    group.add_argument(
        "--max-new-tokens", type=at_least(1, int), default=200, metavar="N", help="Whisper's longest answer per 30 s"
    )
    add_speech_test_option(group)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logging(args.verbose)
    from sdumc.extraction.features import extract_transcripts
    from sdumc.extraction.loop import data_hash, load_job, open_shard, sound_batches
    from sdumc.machine import pick_device
    from sdumc.pretrained.loading import DTYPES, fingerprint
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
        "speech_test": args.speech_test,
        "dtype": args.dtype,
        "data_hash": data_hash(data),
    }
    batches = sound_batches(args, data, utterances)
    with open_shard(args, settings, utterances) as writer:
        extract_transcripts(data, batches, recogniser, writer, args.bad_media, args.speech_test)


if __name__ == "__main__":
    run(main)
