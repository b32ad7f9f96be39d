"""The command `sdumc`: `sdumc train ...` is `python -m sdumc.bin.train ...`.

It imports nothing but the command that is called, so that `--help` and completion are fast.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys

from sdumc import __version__
from sdumc.cli import run
from sdumc.errors import EXIT_USAGE

# Every module of sdumc.bin and a line that says what it does. The tests check that none is missing.
GROUPS: dict[str, dict[str, str]] = {
    "data (stage 1)": {
        "prepare_mosei": "CMU-MOSEI or CMU-MOSI from raw videos: data directories",
        "import_table": "any corpus from a CSV or TSV file with a line a clip: data directories",
        "import_toolkit": "CMU-MOSEI or CMU-MOSI from a feature pickle of the MMSA toolkit: dump folders",
        "import_authors": "CMU-MOSEI from the features that the SDUMC authors share: dump folders",
        "audit_transcripts": "find clips whose transcript is not what is said in them",
    },
    "text and features (stages 2 and 3)": {
        "recognize": "transcripts by a speech recogniser",
        "train_projector": "train the projector between speech encoder and LLM",
        "simulate_text": "simulated text: the speech LLM's transcripts and hidden states",
        "extract_audio": "audio features of a speech encoder",
        "extract_text": "text features: LLM hidden states at given transcripts",
        "extract_video": "video features of whole pictures or of the tracked face",
        "finish_dump": "join the shards of a feature",
    },
    "training (stage 4)": {
        "train": "train the model, on one process or many",
    },
    "scoring (stages 5 and 6)": {
        "decode": "predictions of a trained model under the conditions full, missing, asr, none",
        "score": "error, correlation, accuracies and F1 of predictions",
        "compare": "one table of several experiments, mean and spread over seeds",
        "report": "RESULTS.md, figures and report.html of decoded runs",
    },
    "your own clips": {
        "predict": "score video or audio files with a trained model",
        "demo": "a page on this machine to drop a clip on",
        "pack": "pack a trained model for another machine",
    },
    "tools": {
        "bench": "measure this implementation against the plain one",
    },
}
COMMANDS = {name: line for group in GROUPS.values() for name, line in group.items()}


def module_of(name: str) -> str:
    """The module whose ``get_parser`` and ``main`` are the command ``name``."""
    return "sdumc.bench.__main__" if name == "bench" else f"sdumc.bin.{name}"


def overview() -> str:
    """The text of ``sdumc --help``."""
    lines = ["usage: sdumc COMMAND [OPTIONS]", "       sdumc COMMAND --help"]
    for title, commands in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<18} {line}" for name, line in commands.items())]
    return "\n".join(lines)


def complete() -> None:
    """Answer the shell, which asks through argcomplete for the words that can follow; does not return."""
    import argcomplete

    typed = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].split()
    parser = argparse.ArgumentParser("sdumc")
    parser.add_argument("--version", action="store_true")
    commands = parser.add_subparsers()
    for name, line in COMMANDS.items():
        # Only the command that is typed is imported.
        own = [importlib.import_module(module_of(name)).get_parser()] if name in typed[1:2] else []
        commands.add_parser(name, help=line, parents=own, add_help=not own)
    argcomplete.autocomplete(parser)


def main() -> None:
    if "_ARGCOMPLETE" in os.environ:
        complete()
    words = sys.argv[1:]
    if not words or words[0] in ("--help", "-h", "help"):
        print(overview())
        sys.exit(0 if words else EXIT_USAGE)
    if words[0] == "--version":
        print(f"sdumc {__version__}")
        return
    name = words[0].replace("-", "_")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        print(f"sdumc: error: no command {words[0]!r}; {meant}`sdumc --help` lists the commands", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    sys.argv = [f"sdumc {name}", *words[1:]]
    run(importlib.import_module(module_of(name)).main)


if __name__ == "__main__":
    main()
