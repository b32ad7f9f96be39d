"""The versions of what makes a result: named in a projector's ``config.yaml`` and in each feature's ``<name>.yaml``."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from sdumc import __version__


def installed_versions() -> dict[str, str]:
    """Versions of sdumc, torch, transformers and Python; a package that is not installed is left out."""
    versions = {"sdumc": __version__}
    for package in ("torch", "transformers"):
        try:
            versions[package] = version(package)  # read from its metadata: importing it would take seconds
        except PackageNotFoundError:
            continue
    return {**versions, "python": platform.python_version()}


def different_major(a: Mapping[str, str], b: Mapping[str, str]) -> str | None:
    """The first package of which ``a`` and ``b`` name versions with different first numbers, in words, or None."""
    for package in a:
        if package in b and a[package].split(".")[0] != b[package].split(".")[0]:
            return f"{package} {a[package]} and {b[package]}"
    return None


def all_versions(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, str]:
    """Both lists as one; where they differ, both versions with a comma: ``5.23.0, 5.24.0``."""
    both = dict(a)
    for package, new in b.items():
        known = both.get(package, "").split(", ") if package in both else []
        both[package] = ", ".join([*known, *(v for v in new.split(", ") if v not in known)])
    return both
