#!/usr/bin/env python3
"""What of sdumc's environment is present, with versions, and what is missing and which stage needs it.

The exit code is 1 when something is missing without which no recipe runs (with --extras: or one of these extras).
"""

from __future__ import annotations

import argparse
import ast
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
USED_BY = {  # extra -> who needs it
    "": "all stages",
    "mini": "egs/mini, stage 0",
    "mosei": "egs/mosei, stage 1",
    "test": "tests/run.sh",
}


def requirements() -> dict[str, list[str]]:
    """Requirement strings by extra ("" is the core), as setup.py has them."""
    found: dict[str, list[str]] = {}
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            if node.targets[0].id == "CORE":
                found[""] = ast.literal_eval(node.value)
            elif node.targets[0].id == "EXTRAS":
                found.update(ast.literal_eval(node.value))
    return found


def numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: 2.13.0+cpu -> (2, 13, 0)."""
    return tuple(int(n) for n in re.split(r"[^\d.]", version)[0].split(".") if n)


def split(pattern: str, text: str) -> tuple[str, ...]:
    """The groups of a pattern that setup.py's own lines match whole."""
    found = re.fullmatch(pattern, text)
    if found is None:
        raise ValueError(f"setup.py: {text!r} is no requirement")
    return found.groups()


def compare(version: str, wanted: str) -> bool:
    """Does a version satisfy a specification such as `>=2.4,<2.14`?"""
    mine = numbers(version)
    for part in filter(None, wanted.split(",")):
        operator, bound = split(r"(>=|<=|==|<|>)\s*([\w.]+)", part.strip())
        theirs = numbers(bound)
        size = max(len(mine), len(theirs))
        a, b = mine + (0,) * (size - len(mine)), theirs + (0,) * (size - len(theirs))
        if not {">=": a >= b, "<=": a <= b, "==": a == b, "<": a < b, ">": a > b}[operator]:
            return False
    return True


def package_state(requirement: str) -> tuple[str, str, bool]:
    """(name, version or what is wrong, satisfied?)"""
    name, wanted = split(r"([\w.-]+)(.*)", requirement)
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return name, "missing", False
    if compare(version, wanted):
        return name, version, True
    return name, f"{version}, but {wanted} is needed", False


def program_version(*command: str) -> str | None:
    """First line that looks like a version; None when the program is not there."""
    beside = Path(sys.executable).with_name(command[0])  # in this environment, also when it is not activated
    path = str(beside) if beside.exists() else shutil.which(command[0])
    if path is None:
        return None
    try:
        done = subprocess.run([path, *command[1:]], capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "does not run"
    match = re.search(r"\d+(\.\d+)+", done.stdout + done.stderr)
    return match[0] if match else "present"


def speech_synthesiser() -> str | None:
    """The espeak-ng library: egs/mini speaks with it."""
    try:
        import espeakng_loader

        path = Path(espeakng_loader.get_library_path())
    except (ImportError, OSError):
        return None
    return "present" if path.exists() else None


def gpu() -> tuple[str, str]:
    """(state, meaning) of GPUs."""
    try:
        import torch
    except (ImportError, OSError) as e:
        return "unknown", f"torch cannot be imported: {e}"
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if torch.cuda.is_available():
        names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
        return f"{torch.cuda.device_count()}", f"{', '.join(names)}; torch: {build}"
    if shutil.which("nvidia-smi"):
        return "not usable", f"there is an NVIDIA driver, but torch ({build}) sees no GPU: docs/installation.md"
    return "none", f"stages run on the CPU (--ngpu 0); torch: {build}"


def line(name: str, state: str, meaning: str) -> None:
    print(f"  {name:<22} {state:<28} {meaning}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", default="", help="these extras are needed too, with commas: mini,mosei,test or all")
    parser.add_argument("--quiet", action="store_true", help="no output, only the exit code, and only for the packages")
    parser.add_argument("--requirement", metavar="NAME", help="print what setup.py asks of this package, and end")
    args = parser.parse_args()

    wanted = requirements()
    if args.requirement:
        print(next(r for rs in wanted.values() for r in rs if re.match(rf"{re.escape(args.requirement)}\b", r)))
        return 0
    extras = set(args.extras.split(",")) - {""}
    if "all" in extras:
        extras = set(wanted) - {""}
    if unknown := extras - set(wanted):
        parser.error(f"unknown extra {sorted(unknown)[0]}; there are {', '.join(sorted(set(wanted) - {''}))}")
    needed = {"", *extras}
    states = {extra: [package_state(r) for r in rs] for extra, rs in wanted.items()}
    failed = [name for extra in needed for name, _, fine in states[extra] if not fine]
    if args.quiet:
        return 1 if failed else 0

    print("Python")
    line("python", platform.python_version(), sys.executable)
    for extra, rows in states.items():
        print(f"Packages for {USED_BY.get(extra, extra)}" + (f" (extra {extra})" if extra else ""))
        for name, state, fine in rows:
            line(name, state, "" if fine else "run tools/setup_env.sh" + (f" --extras {extra}" if extra else ""))
    print("Programs and libraries")
    line("espeak-ng library", speech_synthesiser() or "missing", "egs/mini, stage 0")
    for name, command, use in (
        ("bats", ("bats", "--version"), "tests/run.sh"),
        ("shellcheck", ("shellcheck", "--version"), "tests/run.sh"),
        ("git", ("git", "--version"), "for the version in logs"),
        ("Slurm", ("sbatch", "--version"), "only with --cmd-backend slurm"),
    ):
        line(name, program_version(*command) or "missing", use)
    print("Machine")
    line("GPUs", *gpu())
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    line("CPU cores", str(cpus), "")
    if hasattr(os, "sysconf"):
        line(
            "memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB", "egs/mini needs 3 GB"
        )
    line("free disk space", f"{shutil.disk_usage(ROOT).free / 1e9:.0f} GB", "egs/mini needs 1 GB, egs/mosei 300 GB")
    if failed:
        print(f"\nmissing: {', '.join(failed)}", file=sys.stderr)
        return 1
    print("\nnothing is missing" + (f" for {', '.join(sorted(extras))}" if extras else " that all recipes need"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
