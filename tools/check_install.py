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

try:
    from packaging.requirements import Requirement
except ImportError:  # nothing is installed yet; pip has a copy
    from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "tools" / "pins.txt"
SHOWN = 6  # packages that differ from the pins, named in the one line
USED_BY = {  # extra -> who needs it
    "": "all stages",
    "mini": "egs/mini, stage 0",
    "mosei": "egs/mosei, stage 1",
    "demo": "sdumc demo",
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


def canonical(name: str) -> str:
    """The spelling of a package's name that pip compares."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Exact versions by canonical name, of tools/pins.txt for this Python."""
    lines = [Requirement(x) for x in PINS.read_text(encoding="utf-8").splitlines() if x and not x.startswith("#")]
    return {
        canonical(r.name): str(r.specifier).removeprefix("==") for r in lines if r.marker is None or r.marker.evaluate()
    }


def lower_bounds() -> dict[str, str]:
    """The oldest versions that setup.py allows, of the core and all extras."""
    found = [Requirement(r) for rs in requirements().values() for r in rs]
    return {canonical(r.name): s.version for r in found for s in r.specifier if s.operator == ">="}


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def other_than(wanted: dict[str, str]) -> dict[str, str]:
    """Packages that are installed in another version: that version by name."""
    found = {name: installed(name) for name in wanted}
    return {n: v for n, v in found.items() if v and not Requirement(f"{n}=={wanted[n]}").specifier.contains(v, True)}


def package_state(requirement: str) -> tuple[str, str, bool]:
    """(name, version or what is wrong, satisfied?)"""
    wanted = Requirement(requirement)
    version = installed(wanted.name)
    if version is None:
        return wanted.name, "missing", False
    if wanted.specifier.contains(version, prereleases=True):
        return wanted.name, version, True
    return wanted.name, f"{version}, but {wanted.specifier} is needed", False


def constraints(versions: str) -> dict[str, str]:
    """What pip is told for the choices of `tools/setup_env.sh --versions`, and for an environment of the user's own.

    There, `missing`, what is installed and good enough stays as it is.
    """
    if versions == "oldest":
        return lower_bounds()
    if versions == "newest":
        return {}
    if versions == "pinned":
        return pins()
    bad = {canonical(n) for rs in requirements().values() for n, _, fine in map(package_state, rs) if not fine}
    return {name: version for name, version in pins().items() if name in bad or not installed(name)}


def differences() -> str:
    """What is installed in other versions than the pinned ones, in one line; empty if nothing is."""
    found = other_than(pins())
    asked = lower_bounds()
    names = sorted(found, key=lambda name: (name not in asked, name))
    shown = ", ".join(f"{name} {found[name]} (pinned: {pins()[name]})" for name in names[:SHOWN])
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


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


def show_packages(states: dict[str, list[tuple[str, str, bool]]]) -> None:
    print("Python")
    line("python", platform.python_version(), sys.executable)
    pinned, others = pins(), other_than(pins())
    for extra, rows in states.items():
        print(f"Packages for {USED_BY.get(extra, extra)}" + (f" (extra {extra})" if extra else ""))
        for name, state, fine in rows:
            key = canonical(name)
            note = f"pinned: {pinned[key]}" if others.pop(key, None) and key in pinned else ""
            line(name, state, note if fine else "run tools/setup_env.sh" + (f" --extras {extra}" if extra else ""))
    if others:
        print("Packages that these need, in other versions than the pinned ones")
        for name, version in others.items():
            line(name, version, f"pinned: {pinned[name]}")


def show_machine() -> None:
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
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
        line("memory", f"{memory:.0f} GB", "egs/mini needs 3 GB")
    line("free disk space", f"{shutil.disk_usage(ROOT).free / 1e9:.0f} GB", "egs/mini needs 1 GB, egs/mosei 300 GB")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extras", default="", help="these extras are needed too, with commas: mini,mosei,test or all")
    parser.add_argument("--quiet", action="store_true", help="no output, only the exit code, and only for the packages")
    instead = parser.add_argument_group("Print one thing instead").add_mutually_exclusive_group()
    instead.add_argument("--requirement", metavar="NAME", help="what setup.py asks of this package")
    instead.add_argument(
        "--constraints",
        choices=("pinned", "missing", "oldest", "newest"),
        help="constraints for pip; missing: the pinned versions of packages that are missing or out of range",
    )
    instead.add_argument("--differences", action="store_true", help="packages in other versions than the pinned ones")
    return parser


def main() -> int:
    parser = get_parser()
    args = parser.parse_args()
    wanted = requirements()
    if args.requirement:
        print(next(r for rs in wanted.values() for r in rs if re.match(rf"{re.escape(args.requirement)}\b", r)))
        return 0
    if args.constraints:
        print(*(f"{name}=={version}" for name, version in constraints(args.constraints).items()), sep="\n")
        return 0
    if args.differences:
        print(differences())
        return 0
    extras = set(args.extras.split(",")) - {""}
    if "all" in extras:
        extras = set(wanted) - {""}
    if unknown := extras - set(wanted):
        parser.error(f"unknown extra {sorted(unknown)[0]}; there are {', '.join(sorted(set(wanted) - {''}))}")
    states = {extra: [package_state(r) for r in rs] for extra, rs in wanted.items()}
    failed = [name for extra in ("", *sorted(extras)) for name, _, fine in states[extra] if not fine]
    if args.quiet:
        return 1 if failed else 0
    show_packages(states)
    show_machine()
    if failed:
        print(f"\nmissing: {', '.join(failed)}", file=sys.stderr)
        return 1
    print("\nnothing is missing" + (f" for {', '.join(sorted(extras))}" if extras else " that all recipes need"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
