#!/usr/bin/env python3
"""Run a step of a recipe unless it is up to date.

    step.py --name NAME [--inputs F...] [--optional-inputs F...] [--settings F...] [--outputs F...] [--stale F...]
            [--ignore NAME...] [--force] [--state-dir .done]
            -- [RUNNER... --] COMMAND... [--then [RUNNER... --] COMMAND...]...

A step is up to date when all its outputs exist and neither its commands nor its inputs have changed since it last
succeeded. Inputs, optional inputs and settings are files, folders or quoted patterns ('dump/train/*.scp'), compared by
size and time; all but the optional ones have to exist. RUNNER is what stands before a command (a job runner with its
options and log, torchrun): it is no part of the comparison. Nor are the options named by --ignore (without their
dashes) with the word after each, for what does not change the result: `--ignore device` for `--device cuda`.

The commands run one after the other until one fails. One whose work was cut short is expected to go on where it
stopped, so nothing is deleted between two attempts; but when an input has changed, or with --force, what `--stale`
names is deleted before: it was made from something else. Changed settings files and options delete nothing, as commands
check these themselves. Two recipes that come to the same step at once do it once: the second waits.

Prints one line. The exit code is that of the command that failed.
"""

# Every recipe calls this dozens of times, most often to learn that there is nothing to do: it starts in 30 ms, and
# imports that only a running step needs stand in the functions.
import fcntl
import glob
import json
import os
import sys
import time
from zlib import crc32

LISTS = ("--inputs", "--optional-inputs", "--settings", "--outputs", "--stale", "--ignore")
VALUES = ("--name", "--state-dir")


def fail(message: str) -> None:
    print(f"step.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def parse(argv: list[str]) -> tuple[dict, list[tuple[list[str], list[str]]]]:
    """Split the command line into options and commands, each of these into its runner's words and its own."""
    options: dict = {name: [] for name in LISTS} | {"--name": "", "--state-dir": ".done", "--force": False}
    words = list(argv)
    target: list[str] | None = None
    while words and words[0] != "--":
        word = words.pop(0)
        if word in LISTS:
            target = options[word]
        elif word in VALUES:
            target = None
            if not words:
                fail(f"option {word} needs a value")
            options[word] = words.pop(0)
        elif word == "--force":
            target = None
            options[word] = True
        elif word.startswith("--") or target is None:
            fail(f"unexpected word {word!r}; the command comes after --")
        elif word:
            target.append(word)
    commands = []
    for segment in split(words[1:], "--then"):
        runner, *rest = split(segment, "--", 1)
        commands.append((runner, rest[0]) if rest else ([], runner))
    if not options["--name"] or not all(command for _, command in commands):
        fail("usage: step.py --name NAME [options] -- [RUNNER... --] COMMAND... [--then [RUNNER... --] COMMAND...]...")
    return options, commands


def split(words: list[str], separator: str, at_most: int = -1) -> list[list[str]]:
    """Like str.split, for a list of words."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == separator and at_most != len(parts) - 1:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def stamp(path: str) -> list[list]:
    """[path, size, time in ns] of a file, of every file in a folder, or of all that a pattern matches; [] if none."""
    try:
        status = os.stat(path)
    except OSError:
        if not glob.has_magic(path):
            return []
        return [entry for match in sorted(glob.glob(path)) for entry in stamp(match)]
    if not os.path.isdir(path):
        return [[path, status.st_size, status.st_mtime_ns]]
    found = []
    for entry in sorted(os.scandir(path), key=lambda e: e.name):
        if not entry.name.startswith("."):
            found += stamp(entry.path)
    return found


def stamps(paths: list[str], needed_by: str = "") -> list[list]:
    found = []
    for path in paths:
        mine = stamp(path)
        if not mine and needed_by:
            print(
                f"step.py: error: {needed_by} needs {path}, which is not there or empty; an earlier stage makes it",
                file=sys.stderr,
            )
            sys.exit(1)
        found += mine
    return found


def without_ignored(command: list[str], ignored: list[str]) -> list[str]:
    """The command's words less the options that do not change its result and the values after them."""
    kept: list[str] = []
    skip = False
    for word in command:
        option = word.startswith("--") and word[2:].partition("=")[0] in ignored
        if not skip and not option:
            kept.append(word)
        skip = option and "=" not in word and not skip
    return kept


def change(old: dict | None, new: dict) -> str:
    """Why the step is not up to date, in a word or two; empty when it is."""
    if old is None:
        return "new"
    for key in ("inputs", "settings"):
        if old.get(key) != new[key]:
            before = {tuple(e) for e in old.get(key) or []}
            after = {tuple(e) for e in new[key]}
            names = sorted({e[0] for e in before ^ after})
            return f"changed: {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else key
    return "other options" if old.get("commands") != new["commands"] else ""


def load(path: str) -> dict | None:
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError):
        return None


def save(path: str, value: dict) -> None:
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as f:
        json.dump(value, f)
    os.replace(temporary, path)


def lock(path: str, name: str):
    """Hold the step; wait while another recipe holds it. The lock ends with this process, however it ends."""
    f = open(path, "a")  # noqa: SIM115 (held until this process ends)
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"  wait   {name} (another recipe is doing it)", flush=True)
        fcntl.flock(f, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        pass
    return f


def delete(patterns: list[str]) -> None:
    import shutil

    for pattern in patterns:
        for path in glob.glob(pattern):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)


def run(command: list[str]) -> int:
    """Run a command with this process's streams; stop signals are passed on, and it dies if this process dies."""
    import signal
    import subprocess

    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import jobs

    caught = []
    process = None

    def pass_on(number, _frame):
        caught.append(number)
        # Ctrl-C reaches the whole foreground group by itself; other signals come to this process alone.
        if process is not None and number != signal.SIGINT:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    jobs.die_with_parent()
    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=jobs.in_child)
    except OSError as e:
        print(f"\nstep.py: error: cannot start {command[0]}: {e.strerror}", file=sys.stderr)
        return 127
    code = process.wait()
    if caught:
        return 128 + caught[0]
    return code if code >= 0 else 128 - code


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h"):
        print(__doc__.strip())
        return 0 if argv else 2
    options, commands = parse(argv)
    name, outputs = options["--name"], options["--outputs"]
    folder = options["--state-dir"]
    # The first output tells apart steps of the same name in other folders.
    slug = "".join(c if c.isalnum() else "-" for c in name) + f"-{crc32('|'.join([name, *outputs[:1]]).encode()):08x}"
    done_file, started_file = os.path.join(folder, slug + ".done"), os.path.join(folder, slug + ".started")

    def signature() -> dict:
        inputs = stamps(options["--inputs"], needed_by=name) + stamps(options["--optional-inputs"])
        return {
            "commands": [without_ignored(command, options["--ignore"]) for _, command in commands],
            "inputs": inputs,
            "settings": stamps(options["--settings"], needed_by=name),
        }

    def why(now: dict) -> str:
        missing = [path for path in outputs if not stamp(path)]
        if options["--force"]:
            return "forced"
        return change(load(done_file), now) or (f"missing: {missing[0]}" if missing else "")

    now = signature()
    if not why(now):
        print(f"  skip   {name} (up to date)")
        return 0
    os.makedirs(folder, exist_ok=True)
    held = lock(os.path.join(folder, slug + ".lock"), name)
    now = signature()
    reason = why(now)
    if not reason:  # the other recipe has done it
        print(f"  skip   {name} (up to date)")
        return 0

    last = load(started_file) or load(done_file)
    if reason == "new" and last is not None and last["inputs"] == now["inputs"]:
        reason = "going on"
    print(f"  run    {name} ({reason}) ... ", end="", flush=True)
    if options["--force"] or (last is not None and last["inputs"] != now["inputs"]):
        delete(options["--stale"])
    save(started_file, now)
    if os.path.exists(done_file):  # what it vouched for is about to change
        os.unlink(done_file)
    start = time.monotonic()
    for runner, command in commands:
        code = run(runner + command)
        if code != 0:
            print(f"failed   {name} after {time.monotonic() - start:.1f} s", flush=True)
            return code
    missing = [path for path in outputs if not stamp(path)]
    if missing:
        print(f"failed   {name}: it ended well, but {missing[0]} is not there", flush=True)
        return 1
    os.replace(started_file, done_file)
    print(f"{time.monotonic() - start:.1f} s", flush=True)
    held.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
