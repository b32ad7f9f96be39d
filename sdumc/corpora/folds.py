"""Fold files: which videos are for training, validation and test."""

from __future__ import annotations

import ast
from pathlib import Path

from sdumc.corpora.sets import FOLDS
from sdumc.errors import UserError

_SDK_NAMES = {"standard_train_fold": "train", "standard_valid_fold": "valid", "standard_test_fold": "test"}


def read_folds(path: str | Path) -> dict[str, list[str]]:
    """Video ids by fold.

    Args:
        path: a folder with ``train.txt``, ``valid.txt``, ``test.txt`` of one video id a line; or the CMU SDK's
            ``cmu_mosei_std_folds.py`` (or ``cmu_mosi_...``), whose three lists are read as literals: nothing is run.

    Raises:
        UserError: a file is missing, a list is no list of strings, an id is there twice or in two folds.
    """
    path = Path(path)
    if path.is_dir():
        scripts = sorted(path.glob("*std_folds.py"))
        if not (path / "train.txt").exists() and len(scripts) == 1:
            return read_folds(scripts[0])
        folds = {name: _read_list(path / f"{name}.txt") for name in FOLDS}
    elif path.suffix == ".py":
        folds = _read_sdk(path)
    else:
        raise UserError(f"{path}: give a folder with train.txt, valid.txt and test.txt, or the SDK's std_folds.py")
    owner: dict[str, str] = {}
    for name in FOLDS:
        if not folds[name]:
            raise UserError(f"{path}: fold {name} is empty")
        for video in folds[name]:
            if video in owner:
                raise UserError(
                    f"{path}: video {video!r} is in {owner[video]} and in {name}"
                    + (" (twice)" if owner[video] == name else "; the folds must be disjoint")
                )
            owner[video] = name
    return folds


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None


def _read_list(path: Path) -> list[str]:
    videos = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        fields = line.split()
        if len(fields) > 1:
            raise UserError(f"{path}:{number}: expected one video id, found {line.strip()!r}")
        videos += fields
    return videos


def _read_sdk(path: Path) -> dict[str, list[str]]:
    try:
        tree = ast.parse(_read(path), str(path))
    except (SyntaxError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: not a Python file that can be parsed ({e})") from None
    found: dict[str, list[str]] = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            if isinstance(target, ast.Name) and target.id in _SDK_NAMES:
                try:
                    value = ast.literal_eval(node.value)
                except (ValueError, TypeError, SyntaxError):
                    value = None
                if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
                    raise UserError(f"{path}:{node.lineno}: {target.id} is not a plain list of strings")
                found[_SDK_NAMES[target.id]] = list(value)
    if missing := [k for k, v in _SDK_NAMES.items() if v not in found]:
        raise UserError(f"{path}: has no {', '.join(missing)}; expected the CMU SDK's file of standard folds")
    return found
