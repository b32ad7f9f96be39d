"""Train the small speech encoder, LLM and vision model of egs/mini on the train clips of its corpus.

Writes MODELS_DIR/encoder and MODELS_DIR/ctc (WavLM), MODELS_DIR/llm (Llama), MODELS_DIR/vision (ViT), as transformers
saves them; each folder appears only when whole.
"""

from __future__ import annotations

from collections.abc import Sequence

from sdumc.cli import Parser, run, setup_logging
from sdumc.errors import UserError


def get_parser() -> Parser:
    parser = Parser(__doc__)
    group = parser.add_argument_group("input and output")
    group.add_argument("--corpus-dir", required=True, help="folder that make_mini_corpus wrote")
    group.add_argument("--models-dir", required=True, help="folder for the models")
    group.add_argument("--what", nargs="+", choices=("encoder", "llm", "vision"), default=["encoder", "llm", "vision"])
    group = parser.add_argument_group("training")
    group.add_argument("--encoder-front-steps", type=int, default=150, help="steps of the convolutions alone")
    group.add_argument("--encoder-steps", type=int, default=800, help="steps of the encoder")
    group.add_argument("--llm-steps", type=int, default=500, help="steps of the LLM")
    group.add_argument("--vision-steps", type=int, default=300, help="steps of the vision model")
    group.add_argument("--seed", type=int, default=1)
    group.add_argument("--threads", type=int, default=1, help="CPU threads; another number may change the last bits")
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    args = get_parser().parse_args(argv)
    for option in ("encoder_front_steps", "encoder_steps", "llm_steps", "vision_steps", "threads"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} must be at least 1")
    setup_logging(args.verbose)
    from pathlib import Path

    import torch

    from sdumc.mini import pretrain

    torch.set_num_threads(args.threads)
    corpus_dir, models_dir = Path(args.corpus_dir), Path(args.models_dir)
    if "encoder" in args.what:
        settings = pretrain.EncoderSettings(
            seed=args.seed, front_steps=args.encoder_front_steps, steps=args.encoder_steps
        )
        pretrain.train_encoder(corpus_dir, models_dir, settings)
    if "llm" in args.what:
        pretrain.train_llm(corpus_dir, models_dir, pretrain.LanguageSettings(seed=args.seed, steps=args.llm_steps))
    if "vision" in args.what:
        pretrain.train_vision(corpus_dir, models_dir, pretrain.VisionSettings(seed=args.seed, steps=args.vision_steps))
    return None


if __name__ == "__main__":
    run(main)
