#!/usr/bin/env python3
"""check_models.py FOLDER...: are these model folders whole? Prints what is wrong with each; loads nothing."""

from __future__ import annotations

import sys

from sdumc.errors import UserError
from sdumc.simulation.checkpoints import model_folder, read_model_config, weight_files


def main(names: list[str]) -> int:
    wrong = 0
    for name in names:
        try:
            folder = model_folder(name)
            kind = read_model_config(folder)["model_type"]
            size = sum(file.stat().st_size for file in weight_files(folder))
            print(f"{folder}: {kind}, {size / 2**30:.2f} GiB of weights")
        except UserError as e:
            print(f"error: {e} (tools/fetch_models.sh fetches the models)", file=sys.stderr)
            wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
