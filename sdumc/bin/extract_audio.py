"""Stage 3: audio features, one hidden layer of a speech encoder, for one shard of a data directory."""

from __future__ import annotations

from collections.abc import Sequence

from sdumc.cli import Parser, add_job_options, run, setup_logging


def get_parser() -> Parser:
    parser = Parser(
        "Write the frames of one hidden layer of a speech encoder (WavLM, wav2vec 2.0, HuBERT, Whisper) for a shard of "
        "a data directory;\n`sdumc.bin.finish_dump --name audio` then joins the shards."
    )
    add_job_options(parser, "audio")
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="DIR", help="speech encoder: a transformers folder")
    group.add_argument("--layer", type=int, default=-5, help="as in hidden_states[layer]; -1 is the encoder's output")
    group.add_argument(
        "--normalise", choices=("yes", "no"), default="yes", help="clips to zero mean and unit variance first"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logging(args.verbose)
    from sdumc.extraction.features import extract_audio
    from sdumc.extraction.loop import data_hash, load_job, open_shard, sound_batches
    from sdumc.machine import pick_device
    from sdumc.pretrained.loading import DTYPES, fingerprint
    from sdumc.pretrained.speech import SpeechEncoder

    data, utterances = load_job(args)
    device = pick_device(args.device)
    encoder = SpeechEncoder(args.model, DTYPES[args.dtype], device, args.layer, args.normalise == "yes")
    settings = {
        "extractor": "audio",
        "model": args.model,
        "model_hash": fingerprint(encoder.folder),
        "layers": [args.layer],
        "normalise": args.normalise == "yes",
        "frame_rate": encoder.frame_rate,
        "dtype": args.dtype,
        "data_hash": data_hash(data),
    }
    batches = sound_batches(args, data, utterances)
    with open_shard(args, settings, utterances) as writer:
        extract_audio(data, batches, encoder, writer, args.bad_media)


if __name__ == "__main__":
    run(main)
