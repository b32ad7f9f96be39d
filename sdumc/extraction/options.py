"""Options of the commands that run the speech LLM, so that real and simulated text cannot drift apart."""

from __future__ import annotations

import argparse
from typing import Any

from sdumc.cli import Parser
from sdumc.errors import UserError
from sdumc.pretrained.prompts import prompt_text


def add_prompt_option(group: Any) -> None:
    """``--prompt``, a text or the name of one of the two prompts in circulation."""
    group.add_argument(
        "--prompt",
        default="short",
        metavar="TEXT",
        help="between 'USER: ' and '\\n ASSISTANT:'; `short` and `long` stand for the prompts in circulation "
        "(released projector; SDUMC authors). Use the one that the projector was trained with",
    )


def add_state_options(parser: Parser) -> None:
    """Which hidden states make the text representation."""
    group = parser.add_argument_group("representation")
    group.add_argument(
        "--layers",
        type=int,
        nargs="+",
        default=[-4],
        metavar="L",
        help="LLM layers that are summed, as in hidden_states",
    )
    group.add_argument(
        "--first-state",
        choices=("drop", "keep"),
        default="drop",
        help="the state before the first token (the prompt's end; BOS without a context), which predicts that token",
    )
    add_prompt_option(group)


def add_reader_options(group: Any, required: bool) -> None:
    """``--encoder`` and ``--projector``."""
    note = "" if required else " (needed for --context audio+prompt)"
    group.add_argument("--encoder", required=required, metavar="DIR", help=f"speech encoder folder{note}")
    group.add_argument(
        "--projector",
        required=required,
        metavar="PATH",
        help=f"folder of train_projector, its safetensors, or the released torch file{note}",
    )
    group.add_argument("--encoder-layer", type=int, default=-1, help="encoder layer that the projector reads")


def load_reader(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Encoder, projector and LLM of the command line, and what of them belongs into a feature's settings.

    Raises:
        UserError: a folder is incomplete, parts do not fit, or the projector was trained with another prompt.
    """
    from sdumc.device import pick_device
    from sdumc.extraction.simulation import SpeechReader, check_projector_prompt
    from sdumc.pretrained.folders import DTYPES, fingerprint
    from sdumc.pretrained.projector import projector_file
    from sdumc.pretrained.speech_encoder import SpeechEncoder

    if not args.encoder or not args.projector:
        raise UserError("this needs --encoder and --projector (or, for extract_text, another --context)")
    llm, settings = load_llm(args)
    projector = projector_file(args.projector)
    check_projector_prompt(str(projector), llm.prompt)
    encoder = SpeechEncoder(args.encoder, DTYPES[args.dtype], pick_device(args.device), args.encoder_layer)
    settings |= {
        "encoder": args.encoder,
        "encoder_hash": fingerprint(encoder.folder),
        "encoder_layer": args.encoder_layer,
        "projector": args.projector,
        "projector_hash": fingerprint(projector),
    }
    reader = SpeechReader.load(encoder, str(projector), llm)
    if llm.scale_depends_on_version or reader.embedding_scale != 1:
        settings["embedding_scale"] = reader.embedding_scale
    return reader, settings


def load_llm(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The LLM of the command line, and what of it belongs into a feature's settings."""
    from sdumc.device import pick_device
    from sdumc.pretrained.folders import DTYPES, fingerprint
    from sdumc.pretrained.llm import SpeechLLM

    prompt = prompt_text(args.prompt)
    llm = SpeechLLM(args.llm, DTYPES[args.dtype], pick_device(args.device), prompt, args.layers)
    return llm, {
        "model": args.llm,
        "model_hash": fingerprint(llm.folder),
        "layers": args.layers,
        "first_state": args.first_state,
        "prompt": prompt,
        "frame_rate": None,  # one frame per token
        "dtype": args.dtype,
    }
