"""Options that several commands of stages 2 and 3 share, each written once. Quick to import: no torch."""

from __future__ import annotations

from typing import Any

from sdumc.cli import Parser, at_least
from sdumc.conditions import SPEECH_TESTS
from sdumc.device import add_device_option


def add_job_options(parser: Parser, name: str, matrices: bool = True) -> None:
    """Options of a command that writes one shard of a feature, called ``name`` unless the user says otherwise.

    Without ``matrices``, a shard holds transcripts only.
    """
    group = parser.add_argument_group("data and job")
    group.add_argument("--data-dir", required=True, metavar="DIR", help="Kaldi data directory, e.g. data/train")
    group.add_argument("--dump-dir", required=True, metavar="DIR", help="where the shard goes, e.g. dump/train")
    group.add_argument("--name", default=name, help="name of the feature; `finish_dump --name` takes it too")
    group.add_argument("--shard", default="1/1", metavar="JOB/JOBS", help="which part of the utterances, from 1")
    group.add_argument(
        "--bad-media",
        choices=("stop", "absent"),
        default="stop",
        help="a media file that cannot be read stops the job, or counts as an absent modality (listed)",
    )
    if matrices:
        group.add_argument(
            "--compress",
            choices=("no", "two-byte", "one-byte"),
            default="no",
            help="store values as Kaldi's compressed matrices: half or a quarter of the space, rounded values",
        )
    add_compute_options(parser)
    group = parser.add_argument_group("batches")
    group.add_argument("--batch-size", type=int, default=16, metavar="N", help="most utterances in a batch")
    group.add_argument(
        "--batch-seconds", type=float, default=400.0, metavar="S", help="most seconds of sound in a batch, padded"
    )


def add_compute_options(parser: Parser) -> None:
    """``--device`` and ``--dtype``."""
    group = parser.add_argument_group("computing")
    add_device_option(group)
    group.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="number format of the models")


def add_prompt_option(group: Any) -> None:
    """``--prompt``, a text or the name of one of the two prompts in circulation, and ``--prompt-template``."""
    group.add_argument(
        "--prompt",
        default="short",
        metavar="TEXT",
        help="the instruction; `short` and `long` stand for the prompts in circulation "
        "(released projector; SDUMC authors). Use the one that the projector was trained with",
    )
    group.add_argument(
        "--prompt-template",
        default="released",
        metavar="TEXT",
        help="what stands around the prompt: `released` ('USER: {prompt}\\n ASSISTANT:', as for the released "
        "projector), `chat` (the LLM's own chat template), `auto` (that if there is one), or a text with {prompt} in "
        "it. Use the one that the projector was trained with",
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


def add_speech_test_option(group: Any) -> None:
    """``--speech-test``, the same in recognition and simulation."""
    group.add_argument(
        "--speech-test",
        choices=SPEECH_TESTS,
        default=SPEECH_TESTS[0],
        help="a clip without speech gets no words: where a voice activity detector finds less than 0.3 s, or by level "
        "alone (-60 dB; for speech in noise as loud as itself, which the detector misses)",
    )


def add_rescoring_options(parser: Parser) -> None:
    """``--rescorer`` and its weight."""
    group = parser.add_argument_group("rescoring")
    group.add_argument(
        "--rescorer",
        metavar="DIR",
        help="recogniser (CTC or Whisper) that helps to choose among the hypotheses of the beam",
    )
    group.add_argument(
        "--rescore-weight",
        type=at_least(0, float, 1),
        default=0.5,
        metavar="X",
        help="its part in the choice, from 0 (the LLM alone) to below 1",
    )
    group.add_argument(
        "--rescore-language", default="en", metavar="LANG", help="of the speech, for multilingual Whisper"
    )


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
