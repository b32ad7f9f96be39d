#!/usr/bin/env python3
"""What a stage script has to know of YAML files.

yaml_for_shell.py settings FILE           FILE and the files that its `base:` leads to, a line each
yaml_for_shell.py value KEY FILE         the value of KEY in FILE or the nearest of its bases; nothing where it has none
yaml_for_shell.py imported DUMP SET...    `SET NAME` for each feature DUMP/SET/NAME.yaml that stage 1 has imported
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdumc.errors import UserError
from sdumc.files import read_yaml, settings_chain


def settings(path: str) -> list[str]:
    """A settings file and its bases. What is wrong with one of them, the command that reads it tells."""
    found = []
    with contextlib.suppress(UserError):
        for file, _ in settings_chain(path):
            found.append(file)
    return found or [path]


def value(key: str, path: str) -> list[str]:
    """The value of a setting, which is written with dashes or underscores."""
    with contextlib.suppress(UserError):
        for _, content in settings_chain(path):
            for name, found in content.items():
                if str(name).replace("_", "-") == key:
                    return [str(found)]
    return []


def imported(dump: str, sets: list[str]) -> list[str]:
    """`SET NAME` of every imported feature.

    Raises:
        UserError: a feature's yaml cannot be read.
    """
    found = []
    for name in sets:
        for path in sorted(Path(dump, name).glob("*.yaml")):
            if read_yaml(path).get("imported") is True:
                found.append(f"{name} {path.stem}")
    return found


def main(argv: list[str]) -> int:
    if argv[:1] == ["settings"] and len(argv) == 2:
        lines = settings(argv[1])
    elif argv[:1] == ["value"] and len(argv) == 3:
        lines = value(argv[1], argv[2])
    elif argv[:1] == ["imported"] and len(argv) >= 3:
        try:
            lines = imported(argv[1], argv[2:])
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)
            return 1
    else:
        print((__doc__ or "").strip(), file=sys.stderr)
        return 2
    print("".join(f"{line}\n" for line in lines), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
