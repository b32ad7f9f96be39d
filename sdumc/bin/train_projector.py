"""Stage 2: train the projector between a frozen speech encoder and a frozen LLM on transcribed speech."""

from __future__ import annotations

import argparse
import logging
import signal
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdumc.cli import Parser, add_compute_options, add_prompt_option, at_least, run, setup_logging
from sdumc.errors import EXIT_REQUEUE, UserError
from sdumc.machine import StopSignal

if TYPE_CHECKING:
    from sdumc.pretrained.llm import SpeechLLM
    from sdumc.pretrained.speech import SpeechEncoder

log = logging.getLogger("sdumc")


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
    group.add_argument("--folds", metavar="FILE", help="the part of each utterance, for --leave-out")
    group.add_argument(
        "--leave-out", metavar="PART", help="cross-fitting: do not learn from this part of the train set"
    )
    group.add_argument("--output", required=True, metavar="DIR", help="folder to write, e.g. exp/projector")
    group = parser.add_argument_group("models")
    group.add_argument("--encoder", required=True, metavar="DIR", help="speech encoder: a transformers folder")
    group.add_argument("--encoder-layer", type=int, default=-1, help="encoder layer that the projector reads")
    group.add_argument(
        "--whisper-window",
        choices=("30s", "clip"),
        default="30s",
        help="what a Whisper encoder reads: the clip padded to 30 s, or the clip alone, which is ten times as fast",
    )
    group.add_argument("--llm", required=True, metavar="DIR", help="causal LLM: a transformers folder")
    add_prompt_option(group)
    group.add_argument("--k", type=at_least(1, int), default=5, metavar="N", help="encoder frames per LLM embedding")
    group.add_argument(
        "--hidden", type=at_least(1, int), default=2048, metavar="N", help="width of the projector's hidden layer"
    )
    add_compute_options(parser)
    _add_training(parser.add_argument_group("training"))
    _add_validation(parser.add_argument_group("validation"))
    return parser


def _add_training(g: Any) -> None:
    whole, positive = at_least(0, int), at_least(1, int)
    g.add_argument(
        "--ctc-steps",
        type=whole,
        default=0,
        metavar="N",
        help="steps of a warm start before the others, without the LLM's layers: frames become like the embeddings of "
        "the transcript's tokens",
    )
    g.add_argument("--steps", type=positive, default=10000, metavar="N", help="optimiser steps")
    g.add_argument("--batch-size", type=positive, default=16, metavar="N", help="utterances per step")
    g.add_argument("--learning-rate", type=at_least(0), default=1e-4, metavar="X", help="highest, after the warm-up")
    g.add_argument("--warmup-steps", type=whole, default=1000, metavar="N", help="linear rise; then a linear fall to 0")
    g.add_argument("--weight-decay", type=at_least(0), default=0.0, metavar="X", help="of AdamW")
    g.add_argument("--clip", type=at_least(0), default=1.0, metavar="X", help="largest gradient norm (0: any)")
    g.add_argument("--seed", type=whole, default=1, metavar="N", help="of weights and order")
    g.add_argument("--cache-mb", type=whole, default=1024, metavar="N", help="memory for encoder outputs")
    g.add_argument("--checkpoint-interval", type=positive, default=500, metavar="N", help="steps between checkpoints")


def _add_validation(g: Any) -> None:
    whole, positive = at_least(0, int), at_least(1, int)
    g.add_argument("--valid-interval", type=positive, default=1000, metavar="N", help="steps between looks at the loss")
    g.add_argument("--valid-utterances", type=positive, default=500, metavar="N", help="how many, spread evenly")
    g.add_argument("--wer-utterances", type=whole, default=50, metavar="N", help="how many are transcribed at the end")
    g.add_argument("--max-new-tokens", type=positive, default=200, metavar="N", help="longest transcript then")


def describe_models(args: argparse.Namespace, encoder: SpeechEncoder, llm: SpeechLLM) -> dict[str, Any]:
    """What of the command line, besides data and settings, decides the result; it is kept in config.yaml."""
    from sdumc.pretrained.loading import fingerprint

    return {
        "encoder": args.encoder,
        "encoder_hash": fingerprint(encoder.folder),
        "encoder_layer": args.encoder_layer,
        "whisper_window": args.whisper_window,
        "llm": args.llm,
        "llm_hash": fingerprint(llm.folder),
        "embedding_scale": llm.embedding_scale,
        "prompt": llm.prompt,
        "prompt_template": llm.template,
        "text_case": args.text_case,
        "dtype": args.dtype,
    }


def leave_out(args: argparse.Namespace, texts: dict[str, str]) -> dict[str, Any]:
    """Remove the transcripts of the part that is not to be learned from; gives what describes it in config.yaml."""
    from sdumc.data.tables import read_table
    from sdumc.files import settings_hash

    if not args.folds or not args.leave_out:
        if args.folds or args.leave_out:
            raise UserError("--folds and --leave-out belong together; give both or none")
        return {}
    part_of = read_table(args.folds)
    out = [u for u in texts if part_of.get(u, args.leave_out) == args.leave_out]
    if args.leave_out not in part_of.values() or len(out) == len(texts):
        raise UserError(f"{args.folds}: there is no part {args.leave_out}, or nothing is left to learn from without it")
    log.info("without part %s of %s: %d of %d utterances", args.leave_out, args.folds, len(out), len(texts))
    for utt in out:
        del texts[utt]
    return {"left_out": args.leave_out, "left_out_hash": settings_hash({"utterances": out})}


def main(argv: Sequence[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    stop = StopSignal(signal.SIGTERM, signal.SIGUSR1)
    setup_logging(args.verbose)
    from sdumc.data.kaldi_dir import load_kaldi_dir
    from sdumc.extraction.loop import data_hash
    from sdumc.machine import pick_device
    from sdumc.pretrained.llm import SpeechLLM, prompt_text
    from sdumc.pretrained.loading import DTYPES
    from sdumc.pretrained.speech import SpeechEncoder
    from sdumc.training.checkpoint import hold_folder
    from sdumc.training.data import TranscribedSpeech
    from sdumc.training.projector import ProjectorSettings, is_finished, partial_folder, train_projector

    settings = ProjectorSettings(**{f.name: getattr(args, f.name) for f in fields(ProjectorSettings)})
    dirs = {"train": args.train_data_dir, "valid": args.valid_data_dir}
    sets = {name: load_kaldi_dir(path) for name, path in dirs.items() if path}
    device, dtype = pick_device(args.device), DTYPES[args.dtype]
    llm = SpeechLLM(args.llm, dtype, device, prompt_text(args.prompt), template=args.prompt_template)
    encoder = SpeechEncoder(args.encoder, dtype, device, args.encoder_layer, window=args.whisper_window)
    described, speech = describe_models(args, encoder, llm), {}
    for name, data in sets.items():
        described |= {f"{name}_data_dir": str(data.path), f"{name}_data_hash": data_hash(data, data.path / "text")}
        texts = {u: t.lower() if args.text_case == "lower" else t for u, t in data.text.items()}
        if name == "train":
            described |= leave_out(args, texts)
        speech[name] = TranscribedSpeech(data, texts, encoder, settings.cache_mb * 2**20 // len(sets))
    train, valid, output = speech["train"], speech.get("valid"), Path(args.output)
    if is_finished(output, described, settings):
        log.info("%s: there already, from the same models, data and settings; remove it to train again", output)
        return 0
    with hold_folder(partial_folder(output)):
        result = train_projector(llm, encoder, train, valid, settings, output, described, stop)
    if result is None:
        return EXIT_REQUEUE
    if result.get("valid_wer") is not None:
        print(f"{args.output}: valid loss {result['valid_loss']:.3f}, WER {100 * result['valid_wer']:.1f}%")
    return 0


if __name__ == "__main__":
    run(main)
