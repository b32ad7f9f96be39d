#!/usr/bin/env python3
"""Check that model folders are complete: print what each holds, or what is wrong with it. Loads nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sdumc.cli import Parser, run
from sdumc.errors import EXIT_USER_ERROR, UserError
from sdumc.pretrained.loading import model_folder, read_model_config, whole_weights

# Beside configuration and weights, by what the model is for: one file of each group.
TOKENISER = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
NEEDED = {"encoder": (), "llm": (TOKENISER,), "asr-model": (TOKENISER, PROCESSOR), "vision-model": (PROCESSOR,)}


def describe(name: str, role: str) -> str:
    """What a folder holds, in a line.

    Raises:
        UserError: something of it is missing, empty or cut short.
    """
    folder = model_folder(name)
    kind = read_model_config(folder)["model_type"]
    size = sum(file.stat().st_size for file in whole_weights(folder))
    for group in NEEDED[role]:
        if not any(Path(folder, file).is_file() for file in group):
            raise UserError(f"{folder}: incomplete model, there is no {' or '.join(group)}; fetch the model again")
    return f"{folder}: {kind}, {size / 2**30:.2f} GiB of weights"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__ or "")
    group = parser.add_argument_group("models")
    for role in NEEDED:
        group.add_argument(f"--{role}", metavar="DIR", help="folder of the model")
    args = vars(parser.parse_args(argv))
    wrong = 0
    for role in NEEDED:
        if name := args[role.replace("-", "_")]:
            try:
                print(describe(name, role))
            except UserError as e:
                print(f"error: --{role} {e} (tools/fetch_models.sh fetches the models)", file=sys.stderr)
                wrong += 1
    return EXIT_USER_ERROR if wrong else 0


if __name__ == "__main__":
    run(main)
