"""Shared by all commands: a parser that reads YAML strictly, options, logging, and errors without tracebacks.

An option that several commands have is written once, here. Quick to import: no torch.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import configargparse
import yaml

from sdumc import __version__
from sdumc.conditions import SPEECH_TESTS
from sdumc.errors import EXIT_USAGE, EXIT_USER_ERROR, UserError
from sdumc.files import disk_full, settings_chain
from sdumc.machine import add_device_option, exit_process

log = logging.getLogger("sdumc")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show defaults, and keep the line breaks of a command's description."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS) or action.required:
            return action.help
        return super()._get_help_string(action)


class _ConfigFileParser(configargparse.YAMLConfigFileParser):
    """Accepts a YAML file that has only comments; configargparse would call it an error."""

    def parse(self, stream):
        text = stream.read()
        if yaml.safe_load(text) is None:
            return {}
        return super().parse(io.StringIO(text))


class Parser(configargparse.ArgumentParser):
    """A configargparse parser with ``--config FILE.yaml``, in which an unknown or repeated key is an error."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            formatter_class=_Formatter,
            config_file_parser_class=_ConfigFileParser,
            add_config_file_help=False,
            add_env_var_help=False,
            allow_abbrev=False,
        )
        self.add_argument("--config", is_config_file=True, metavar="FILE.yaml", help="YAML file of these options")
        self.add_argument("--version", action="version", version=f"sdumc {__version__}")
        self.add_argument("--verbose", action="store_true", help="log debug messages too")

    def parse_args(self, args: Sequence[str] | None = None, namespace=None, **kwargs):
        args = list(sys.argv[1:] if args is None else args)
        if paths := _config_files(args):
            settings = {}
            for path in paths:
                settings.update(self._read_settings(path))
            # configargparse does not know `base:`, so it gets the merged settings as text and reads no file itself.
            kwargs["config_file_contents"] = yaml.safe_dump(settings)
        return super().parse_args(args, namespace, **kwargs)

    def _read_settings(self, path: str) -> dict:
        """The settings of a file on top of those of its bases; exits with an error for an unknown key."""
        known = {
            option.lstrip("-").replace("_", "-")
            for action in self._actions
            for option in action.option_strings
            if option.startswith("--")
        }
        settings: dict[str, Any] = {}
        try:
            files = list(settings_chain(path))
        except UserError as e:
            self.exit(EXIT_USAGE, f"error: {e}\n")
        for file, keys in reversed(files):
            own = {str(key).replace("_", "-"): value for key, value in keys.items()}
            if unknown := [key for key in own if key not in known]:
                self.exit(
                    EXIT_USAGE,
                    f"error: {file}: unknown key {unknown[0]!r}; `{_command()} --help` lists the keys\n",
                )
            settings.update(own)
        return settings


def _config_files(args: Sequence[str]) -> list[str]:
    found = [args[i + 1] for i, a in enumerate(args[:-1]) if a == "--config"]
    return found + [a.split("=", 1)[1] for a in args if a.startswith("--config=")]


def _command() -> str:
    """How this command was called, for messages: ``python -m sdumc.bin.train`` or ``sdumc train``."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return f"python -m {spec.name}" if spec and spec.name != "sdumc.__main__" else Path(sys.argv[0]).name


def setup_logging(verbose: bool = False, prefix: str = "") -> None:
    """Log to stderr with the time. ``prefix`` is put before each message, such as a rank's number.

    Of libraries only errors are shown, unless ``verbose``: matplotlib announces the building of its font cache,
    transformers what it finds odd about a model; what matters of that, our own checks say.
    """
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format=f"%(asctime)s %(levelname)s {prefix}%(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        force=True,
    )
    for noisy in ("matplotlib", "PIL", "urllib3", "httpx", "libav"):
        logging.getLogger(noisy).setLevel(logging.WARNING if verbose else logging.ERROR)
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it sets its own level when it is imported


def at_least(low: float, kind: type = float, below: float | None = None) -> Callable[[str], Any]:
    """The ``type`` of an option whose value must be at least ``low`` and, if given, less than ``below``."""

    def parse(text: str):
        value = kind(text)
        if not (value >= low and (below is None or value < below)):
            limit = f"at least {low}" + (f" and below {below}" if below is not None else "")
            raise argparse.ArgumentTypeError(f"expected {limit}, not {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def add_model_options(group: Any) -> None:
    """``--exp-dir`` and ``--model-dir`` of the commands that score clips."""
    group.add_argument(
        "--exp-dir",
        required=True,
        metavar="PATH",
        help="folder that training wrote, or a model packed by sdumc pack: folder, archive, or OWNER/NAME in the hub's "
        "cache",
    )
    group.add_argument("--model-dir", metavar="DIR", help="folder of the pretrained models, if they were moved")


def add_checkpoint_option(group: Any) -> None:
    """``--checkpoint``: which of the weights that training keeps."""
    group.add_argument(
        "--checkpoint", choices=("valid-best", "averaged"), default="valid-best", help="both were chosen on valid"
    )


_own_process = False


def has_own_process() -> bool:
    """Whether the process was started for the command and ends with it."""
    return _own_process


def run(main: Callable[[Sequence[str] | None], int | None], own_process: bool = True) -> None:
    """Call ``main()`` as a command: a :class:`UserError` becomes one line on stderr and exit code 1. ``own_process``:
    nothing else is to be done in this process."""
    global _own_process
    _own_process = own_process
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if not sys.warnoptions:  # deprecations are for the tests (pyproject.toml); `python -W default` shows them
        warnings.simplefilter("ignore", FutureWarning)
    try:
        code = main(None)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        code = EXIT_USER_ERROR
    except OSError as e:
        if (error := disk_full(e.filename or "output", e)) is None:
            raise
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    exit_process(code or 0)


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
    group.add_argument(
        "--projector-folds",
        metavar="DIR",
        help="cross-fitting: DIR/utt2fold has each utterance's part, DIR/1, DIR/2, ... the projectors that read them",
    )
    group.add_argument("--encoder-layer", type=int, default=-1, help="encoder layer that the projector reads")
