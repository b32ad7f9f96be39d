"""Shared by all commands: a parser that reads YAML strictly, logging, and errors without tracebacks."""

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
from sdumc.errors import EXIT_USAGE, EXIT_USER_ERROR, UserError
from sdumc.files import disk_full, settings_chain
from sdumc.processes import exit_process

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
