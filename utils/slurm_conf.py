"""Translate the runners' options to sbatch options, as conf/slurm.conf says in the syntax of Kaldi's queue.conf.

command sbatch --export=ALL          # the command that every submission begins with
option mem=* --mem=$0                # --mem 4G gives --mem=4G
option gpu=0                         # --gpu 0 gives nothing
option gpu=* --gres=gpu:$0
default gpu=0                        # the value of an option that is not given
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from jobs import UsageError

DEFAULT_FILE = "conf/slurm.conf"
DEFAULT_TEXT = """\
command sbatch --export=ALL
option mem=* --mem=$0
option gpu=0
option gpu=* --gres=gpu:$0
option num_threads=* --cpus-per-task=$0
option num_nodes=* --nodes=$0
option tasks_per_node=* --ntasks-per-node=$0
option time=* --time=$0
option partition=* --partition=$0
option account=* --account=$0
option qos=* --qos=$0
"""


@dataclass
class SlurmConf:
    """The content of a slurm.conf."""

    command: list[str] = field(default_factory=list)
    rules: dict[str, dict[str, list[str]]] = field(default_factory=dict)  # option -> value or "*" -> words
    defaults: dict[str, str] = field(default_factory=dict)

    def words(self, options: dict[str, str]) -> list[str]:
        """The sbatch options for a runner's options.

        Raises:
            UsageError: there is no rule for an option.
        """
        words = []
        for name, value in {**self.defaults, **options}.items():
            if name in ("max_jobs_run", "config"):  # not for sbatch: the array's limit, and the name of this file
                continue
            rules = self.rules.get(name, {})
            rule = rules.get(value, rules.get("*"))
            if rule is None:
                raise UsageError(
                    f"--{name.replace('_', '-')} {value}: slurm.conf has no line `option {name}=...` for it"
                )
            words += [word.replace("$0", value) for word in rule]
        return words


def read(text: str, origin: str) -> SlurmConf:
    """Parse the text of a slurm.conf; `origin` is its name in error messages.

    Raises:
        UsageError: a line is not a command, option or default line, or there is no command line.
    """
    conf = SlurmConf()
    for number, line in enumerate(text.splitlines(), 1):
        words = shlex.split(line, comments=True)
        if not words:
            continue
        kind, rest = words[0], words[1:]
        if kind == "command" and rest:
            conf.command = rest
        elif kind in ("option", "default") and rest and "=" in rest[0]:
            name, _, value = rest[0].partition("=")
            name = name.replace("-", "_")
            if kind == "default":
                conf.defaults[name] = value
            else:
                conf.rules.setdefault(name, {})[value] = rest[1:]
        else:
            raise UsageError(
                f"{origin}, line {number}: expected `command ...`, `option name=value ...` or `default name=value`"
            )
    if not conf.command:
        raise UsageError(f"{origin}: has no `command sbatch ...` line")
    return conf


def load(path: str | None) -> SlurmConf:
    """Read the file that `--config` names, else conf/slurm.conf; if that does not exist, use the built-in text."""
    if path is None and not Path(DEFAULT_FILE).exists():
        return read(DEFAULT_TEXT, "built-in slurm.conf")
    path = path or DEFAULT_FILE
    return read(Path(path).read_text(encoding="utf-8"), path)


def extra_options() -> set[str]:
    """Options that the recipe's slurm.conf adds; run.py accepts them too, so that commands need no change."""
    return set(load(None).rules) if Path(DEFAULT_FILE).exists() else set()
