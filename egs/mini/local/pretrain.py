"""Train the small speech encoder, LLM and vision model of egs/mini on the pretrain set of its corpus.

Writes MODELS_DIR/encoder and MODELS_DIR/ctc (WavLM), MODELS_DIR/llm (Llama), MODELS_DIR/vision (ViT), as transformers
saves them; each folder appears only when whole.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from sdumc.cli import Parser, run, setup_logging
from sdumc.errors import UserError
from sdumc.machine import die_with

MODELS = ("encoder", "llm", "vision")


def get_parser() -> Parser:
    parser = Parser(__doc__)
    group = parser.add_argument_group("input and output")
    group.add_argument("--corpus-dir", required=True, help="folder that make_corpus.py wrote")
    group.add_argument("--models-dir", required=True, help="folder for the models")
    group.add_argument("--what", nargs="+", choices=MODELS, default=list(MODELS), help="which models")
    group = parser.add_argument_group("training")
    group.add_argument("--encoder-front-steps", type=int, default=150, help="steps of the convolutions alone")
    group.add_argument("--encoder-steps", type=int, default=800, help="steps of the encoder")
    group.add_argument("--llm-steps", type=int, default=500, help="steps of the LLM")
    group.add_argument("--vision-steps", type=int, default=300, help="steps of the vision model")
    group.add_argument("--seed", type=int, default=1, help="of weights and order")
    group = parser.add_argument_group("running")
    group.add_argument("--threads", type=int, default=1, help="CPU threads of each; another number changes last bits")
    group.add_argument("--jobs", type=int, default=0, help="models trained at the same time; 0: one per CPU")
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    args = get_parser().parse_args(argv)
    for option in ("encoder_front_steps", "encoder_steps", "llm_steps", "vision_steps", "threads"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} must be at least 1")
    jobs = min(args.jobs or len(os.sched_getaffinity(0)), len(args.what))
    if jobs > 1:
        return _train_in_processes(args.what, list(sys.argv[1:] if argv is None else argv), jobs)
    for what in args.what:
        _train(what, args)
    return None


def _train(what: str, args: argparse.Namespace) -> None:
    """Train one of the models in this process."""
    setup_logging(args.verbose, prefix=f"{what}: ")
    import torch
    import transformers

    from mini.encoder import EncoderSettings, train_encoder
    from mini.llm import LanguageSettings, train_llm
    from mini.vision import VisionSettings, train_vision

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    folders = Path(args.corpus_dir), Path(args.models_dir)
    if what == "encoder":
        steps = {"front_steps": args.encoder_front_steps, "steps": args.encoder_steps}
        train_encoder(*folders, EncoderSettings(seed=args.seed, **steps))
    elif what == "llm":
        train_llm(*folders, LanguageSettings(seed=args.seed, steps=args.llm_steps))
    else:
        train_vision(*folders, VisionSettings(seed=args.seed, steps=args.vision_steps))


def _train_in_processes(what: Sequence[str], argv: Sequence[str], jobs: int) -> int:
    """Run this command once for each model, ``jobs`` at a time; stop at the first that fails and return its code.

    A process of one thread for each is faster than one after the other with several threads.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    waiting = list(what)
    running: list[subprocess.Popen] = []
    command = [sys.executable, __file__, *argv, "--jobs", "1", "--what"]
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(subprocess.Popen([*command, waiting.pop(0)], preexec_fn=die_with))
            time.sleep(0.1)
            for process in [p for p in running if p.poll() is not None]:
                running.remove(process)
                if process.returncode:
                    return process.returncode if process.returncode > 0 else 128 - process.returncode
    finally:
        for process in running:
            process.terminate()
            process.wait()
    return 0


if __name__ == "__main__":
    run(main)
