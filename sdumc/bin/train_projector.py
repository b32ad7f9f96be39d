"""Stage 2: train the projector between a frozen speech encoder and a frozen LLM on transcribed speech."""

from __future__ import annotations

from collections.abc import Sequence

from sdumc.cli import Parser, run, setup_logging
from sdumc.extraction.options import add_compute_options, add_prompt_option


def get_parser() -> Parser:
    parser = Parser(
        "Train the projector on any Kaldi data directory with transcripts (the recipe's train set, LibriSpeech, ...); "
        "encoder and LLM stay frozen.\nWrites OUTPUT/projector.safetensors, config.yaml and train.log. A killed run "
        "goes on from OUTPUT.partial/checkpoint.pt."
    )
    group = parser.add_argument_group("data")
    group.add_argument("--train-data-dir", required=True, metavar="DIR", help="Kaldi data directory with text")
    group.add_argument("--valid-data-dir", metavar="DIR", help="the step with the lowest loss here is kept")
    group.add_argument("--text-case", choices=("keep", "lower"), default="keep", help="change the transcripts' case")
    group.add_argument("--output", required=True, metavar="DIR", help="folder to write, e.g. exp/projector")
    group = parser.add_argument_group("models")
    group.add_argument("--encoder", required=True, metavar="DIR", help="speech encoder: a transformers folder")
    group.add_argument("--encoder-layer", type=int, default=-1, help="encoder layer that the projector reads")
    group.add_argument("--llm", required=True, metavar="DIR", help="causal LLM: a transformers folder")
    add_prompt_option(group)
    group.add_argument("--k", type=int, default=5, metavar="N", help="encoder frames per LLM embedding")
    group.add_argument("--hidden", type=int, default=2048, metavar="N", help="width of the projector's hidden layer")
    add_compute_options(parser)
    group = parser.add_argument_group("training")
    group.add_argument("--steps", type=int, default=10000, metavar="N", help="optimiser steps")
    group.add_argument("--batch-size", type=int, default=16, metavar="N", help="utterances per step")
    group.add_argument("--learning-rate", type=float, default=1e-4, metavar="X", help="highest, after the warm-up")
    group.add_argument(
        "--warmup-steps", type=int, default=1000, metavar="N", help="linear rise; then a linear fall to 0"
    )
    group.add_argument("--weight-decay", type=float, default=0.0, metavar="X", help="of AdamW")
    group.add_argument("--clip", type=float, default=1.0, metavar="X", help="largest gradient norm")
    group.add_argument("--seed", type=int, default=1, metavar="N", help="of weights and order")
    group.add_argument("--cache-mb", type=int, default=1024, metavar="N", help="memory for encoder outputs")
    group.add_argument("--checkpoint-interval", type=int, default=500, metavar="N", help="steps between checkpoints")
    group = parser.add_argument_group("validation")
    group.add_argument("--valid-interval", type=int, default=1000, metavar="N", help="steps between looks at the loss")
    group.add_argument("--valid-utterances", type=int, default=500, metavar="N", help="how many, spread evenly")
    group.add_argument(
        "--wer-utterances", type=int, default=50, metavar="N", help="how many are transcribed at the end"
    )
    group.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="longest transcript then")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logging(args.verbose)
    from dataclasses import fields

    from sdumc.data.kaldi_dir import load_kaldi_dir
    from sdumc.device import pick_device
    from sdumc.errors import UserError
    from sdumc.extraction.job import data_hash
    from sdumc.pretrained.folders import DTYPES, fingerprint
    from sdumc.pretrained.llm import SpeechLLM
    from sdumc.pretrained.prompts import prompt_text
    from sdumc.pretrained.speech_encoder import SpeechEncoder
    from sdumc.simulation.projector_training import Corpus, TrainingSettings, train_projector

    settings = TrainingSettings(**{f.name: getattr(args, f.name) for f in fields(TrainingSettings)})
    for name in ("steps", "batch_size", "learning_rate", "k", "hidden", "valid_interval", "checkpoint_interval"):
        if getattr(settings, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive")
    device, dtype = pick_device(args.device), DTYPES[args.dtype]
    dirs = {"train": load_kaldi_dir(args.train_data_dir)}
    if args.valid_data_dir:
        dirs["valid"] = load_kaldi_dir(args.valid_data_dir)
    prompt = prompt_text(args.prompt)
    llm = SpeechLLM(args.llm, dtype, device, prompt)
    encoder = SpeechEncoder(args.encoder, dtype, device, args.encoder_layer)
    described = {
        "encoder": args.encoder,
        "encoder_hash": fingerprint(encoder.folder),
        "encoder_layer": args.encoder_layer,
        "llm": args.llm,
        "llm_hash": fingerprint(llm.folder),
        "embedding_scale": llm.embedding_scale,
        "prompt": prompt,
        "text_case": args.text_case,
        "dtype": args.dtype,
    }
    corpora = {}
    for name, data in dirs.items():
        described[f"{name}_data_dir"] = str(data.path)
        described[f"{name}_data_hash"] = data_hash(data, data.path / "text")
        texts = {u: t.lower() if args.text_case == "lower" else t for u, t in data.text.items()}
        corpora[name] = Corpus(data, texts, encoder, settings.cache_mb * 2**20 // len(dirs))
    result = train_projector(llm, encoder, corpora["train"], corpora.get("valid"), settings, args.output, described)
    if result.get("valid_wer") is not None:
        print(f"{args.output}: valid loss {result['valid_loss']:.3f}, WER {100 * result['valid_wer']:.1f}%")


if __name__ == "__main__":
    run(main)
