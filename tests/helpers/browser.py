"""Chromium, where there is one: as a program, its name or exit code 1."""

from __future__ import annotations

import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """The first that starts: on some systems a name only tells how to install it."""
    for program in filter(None, map(shutil.which, NAMES)):
        try:
            if subprocess.run([program, "--version"], capture_output=True, timeout=300).returncode == 0:
                return program
        except (OSError, subprocess.TimeoutExpired):
            continue
    return None


if __name__ == "__main__":
    found = find_browser()
    print(found or "")
    sys.exit(found is None)
