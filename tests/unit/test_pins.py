"""tools/pins.txt and the bounds of setup.py fit together, for every Python and every extra."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


@pytest.fixture(scope="module")
def check_install():
    spec = importlib.util.spec_from_file_location("check_install", ROOT / "tools/check_install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pinned(python: str) -> dict[str, list[Version]]:
    """Exact versions by package of the lines that hold for a Python."""
    found: dict[str, list[Version]] = {}
    for line in (ROOT / "tools/pins.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (exact,) = requirement.specifier
            assert exact.operator == "==" and "*" not in exact.version and "+" not in exact.version, line
            if not requirement.marker or requirement.marker.evaluate({"python_full_version": f"{python}.5"}):
                found.setdefault(requirement.name, []).append(Version(exact.version))
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_every_requirement_is_pinned_within_its_range(check_install, python):
    wanted = check_install.requirements()
    assert set(wanted) == {"", "mini", "mosei", "demo", "test"}
    pins = pinned(python)
    assert all(len(versions) == 1 for versions in pins.values())
    for line in (line for lines in wanted.values() for line in lines):
        requirement = Requirement(line)
        (version,) = pins[check_install.canonical(requirement.name)]
        assert version in requirement.specifier, f"{line}: tools/renew_pins.sh"
    (builder,) = re.findall(r'^requires = \["(.*)"\]$', (ROOT / "pyproject.toml").read_text(), flags=re.M)
    assert pins["setuptools"][0] in Requirement(builder).specifier


def test_packages_that_the_requirements_need_are_pinned(check_install):
    """From setup.py's own requirements down, as far as the pinned versions are installed."""
    from importlib import metadata

    pins, seen = check_install.pins(), set()
    others = check_install.other_than(pins)
    todo = [Requirement(line) for lines in check_install.requirements().values() for line in lines]
    while todo:
        requirement = todo.pop()
        name, extras = check_install.canonical(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        assert name in pins, f"{name}: tools/renew_pins.sh --keep"
        for line in [] if name in others else metadata.requires(name) or []:
            needed = Requirement(line)
            if not needed.marker or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                todo.append(needed)
    assert others or len(seen) > 60


def test_the_oldest_set_is_the_lower_bound_of_every_requirement(check_install, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["check_install.py", "--constraints", "oldest"])
    assert check_install.main() == 0
    oldest = dict(line.split("==") for line in capsys.readouterr().out.splitlines())
    wanted = [Requirement(line) for lines in check_install.requirements().values() for line in lines]
    assert len(oldest) == len(wanted)
    for requirement in wanted:
        assert oldest[check_install.canonical(requirement.name)] in requirement.specifier
        assert f">={oldest[check_install.canonical(requirement.name)]}" in str(requirement.specifier)


def test_what_differs_from_the_pins_is_named(check_install, monkeypatch):
    assert check_install.other_than({"numpy": "1.0", "no-such-package": "2.0"}).keys() == {"numpy"}
    versions = {"torch": "2.13.0+cpu", "numpy": "2.4.0", "click": "8.0"}
    monkeypatch.setattr(check_install, "installed", versions.get)
    monkeypatch.setattr(
        check_install, "pins", lambda: {"torch": "2.13.0", "click": "8.1", "numpy": "2.4.6", "av": "18"}
    )
    # A local build is the same version; what setup.py asks for comes first.
    assert check_install.differences() == "numpy 2.4.0 (pinned: 2.4.6), click 8.0 (pinned: 8.1)"
    monkeypatch.setattr(check_install, "SHOWN", 1)
    assert check_install.differences() == "numpy 2.4.0 (pinned: 2.4.6) and 1 more"


def test_an_environment_of_the_users_own_keeps_what_setup_py_allows(check_install, monkeypatch):
    versions = {"torch": "2.9.0+rocm6.4", "numpy": "1.26.4", "click": "8.0"}
    monkeypatch.setattr(check_install, "installed", versions.get)
    found = check_install.constraints("missing")
    assert "torch" not in found and "click" not in found
    assert found["numpy"] == check_install.pins()["numpy"]  # below the bound
    assert found["transformers"] == check_install.pins()["transformers"]
