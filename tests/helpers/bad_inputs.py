#!/usr/bin/env python3
"""Try every bad input of a list, and print what each command says.

    tests/helpers/bad_inputs.py [--page docs/faults.md]

Each case starts from sound files (clips, data directory, features, a trained model), spoils one thing and runs a
command as a user would. What has to be in the message stands beside it: the file, and the utterance if there is one.
Exit code 1: a case ended otherwise than expected. --page writes the list into a page.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
os.environ.setdefault("OMP_NUM_THREADS", "1")

from helpers.commands import call_here, script_here  # noqa: E402

A, B = "ann-1", "bob-1"  # two of the utterances
CLIP = Path(f"data/x/clips/{A}.mp4")
CHECK = "utils/validate_data_dir.py data/x"
AUDIO = "sdumc.bin.extract_audio --data-dir data/x --dump-dir dump/x --model models/encoder --layer -2 --device cpu"
SIZES = "--dim 16 --content-dim 8 --batch-size 4 --epochs 1 --device cpu"
TRAIN = f"sdumc.bin.train --train-dir dump/train --valid-dir dump/valid --exp-dir exp/new {SIZES}"
DECODE = "sdumc.bin.decode --exp-dir exp/old --data-dir dump/valid --condition full --output-dir out --device cpu"
SCORE = "sdumc.bin.score --predictions predictions.tsv --output score.json"
RUN = "egs/TEMPLATE/sdumc.sh"


@dataclass(frozen=True)
class Case:
    title: str
    spoil: Callable[[], object]  # in a folder of sound files
    command: str
    says: tuple[str, ...]  # what the message has in it
    code: int = 1


@dataclass
class Result:
    group: str
    title: str
    command: str
    code: int
    message: str
    wrong: str = ""


# ------------------------------------------------------------------------------------------------- spoiling things


def edit(path: str, old: str, new: str) -> Callable[[], object]:
    """Replace a text that must be in the file."""

    def spoil() -> None:
        text = Path(path).read_text()
        assert old in text, (path, old, text)
        Path(path).write_text(text.replace(old, new, 1))

    return spoil


def write(path: str, text: str | bytes) -> Callable[[], object]:
    def spoil() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(text.encode() if isinstance(text, str) else text)

    return spoil


def cut(path: str | Path, share: float) -> Callable[[], object]:
    return lambda: os.truncate(path, int(os.path.getsize(path) * share))


def remove(path: str | Path) -> Callable[[], object]:
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def without(table: str, utt: str) -> Callable[[], object]:
    """Take an utterance's line out of a table."""

    def spoil() -> None:
        lines = Path(table).read_text().splitlines(keepends=True)
        Path(table).write_text("".join(line for line in lines if line.split()[0] != utt))

    return spoil


def both(*spoils: Callable[[], object]) -> Callable[[], object]:
    return lambda: [spoil() for spoil in spoils]


def sound(rate: int = 16000, channels: int = 1, samples: int = 8000) -> Callable[[], object]:
    """A wav file in the place of a clip's sound."""

    def spoil() -> None:
        import numpy as np
        import soundfile

        values = 0.1 * np.random.default_rng(0).standard_normal((samples, channels))
        soundfile.write("data/x/other.wav", values, rate)
        edit("data/x/wav.scp", str(CLIP), "data/x/other.wav")()

    return spoil


def silent_video() -> None:
    """The clip again, without its audio track."""
    import av

    with av.open(str(CLIP)) as source, av.open("silent.mp4", "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    os.replace("silent.mp4", CLIP)


def short_video() -> None:
    """The clip in a container that can be read as far as it goes, without its second half."""
    import av

    with av.open(str(CLIP)) as source, av.open("short.mkv", "w") as target:
        streams = {s.index: target.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    os.truncate("short.mkv", os.path.getsize("short.mkv") // 2)
    os.replace("short.mkv", CLIP)


def feature_value(path: str, value: float) -> Callable[[], object]:
    """Put a value into the first matrix of an archive."""

    def spoil() -> None:
        with open(path, "r+b") as f:
            f.seek(f.read().index(b"FM ") + 13)
            f.write(struct.pack("<f", value))

    return spoil


def other_dimension() -> None:
    from helpers.dumps import make_dump

    with mock.patch.dict("helpers.dumps.DIMS", audio=7):
        make_dump(Path("dump/other"), 6, 5)
    shutil.rmtree("dump/valid")
    os.rename("dump/other", "dump/valid")


class _Touch:
    def __reduce__(self):
        return (os.system, ("touch owned",))


def evil_pickle() -> None:
    Path("evil.pkl").write_bytes(pickle.dumps({"train": _Touch()}))


def hold_folder() -> None:
    import fcntl

    Path("exp/new").mkdir()
    f = open("exp/new/.lock", "a")  # noqa: SIM115 (held until the case has run)
    fcntl.flock(f, fcntl.LOCK_EX)
    HELD.append(f)
    PATCHES.append(mock.patch("sdumc.training.checkpoint.lock_folder.__defaults__", (0.1,)))


def small_files() -> None:
    PATCHES.append(limited_files(20_000))


@contextlib.contextmanager
def limited_files(size: int):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def ranks_without_address() -> None:
    PATCHES.append(mock.patch.dict(os.environ, RANK="0", WORLD_SIZE="2"))


HELD: list = []
PATCHES: list = []  # what the case that runs needs around it


def nothing() -> None:
    pass


PREDICTIONS = "utt_id\tprediction\tlabel\n{}-1\t0.5\t1.0\nbob-1\t{}\t-1.0\n"
GROUPS: dict[str, list[Case]] = {
    "Sound and pictures": [
        Case("a media file is missing", remove(CLIP), CHECK, (str(CLIP), A)),
        Case("a media file is empty", write(str(CLIP), ""), CHECK, (str(CLIP), A)),
        Case("a media file is cut short", cut(CLIP, 0.6), CHECK, (str(CLIP), A)),
        Case("a file that is no media", write(str(CLIP), "words\n" * 99), CHECK, (str(CLIP), A)),
        Case("a video without an audio track", silent_video, CHECK, (str(CLIP), A, "audio")),
        Case("a video that does not decode to its end", short_video, CHECK, (str(CLIP), A)),
        Case("a wav without samples", sound(samples=0), CHECK, ("data/x/other.wav", A, "no samples")),
        Case("a wav of another rate: resampled", sound(rate=44100), AUDIO, (), 0),
        Case("a wav with two channels: mixed down", sound(channels=2), AUDIO, (), 0),
        Case("the same while features are made", remove(CLIP), AUDIO, (str(CLIP),)),
    ],
    "Data directories": [
        Case("a label is absent", without("data/x/utt2label", A), CHECK, ("data/x/utt2label", A)),
        Case("a label is no number", edit("data/x/utt2label", f"{A} ", f"{A} good"), CHECK, ("utt2label:1", A)),
        Case("a label is not finite", edit("data/x/utt2label", f"{A} 1.0", f"{A} nan"), CHECK, ("utt2label", A)),
        Case("a label is out of range", edit("data/x/utt2label", f"{A} 1.0", f"{A} 3.5"), CHECK, ("utt2label", A)),
        Case("an id occurs twice", edit("data/x/text", f"{B} ", f"{A} "), CHECK, ("data/x/text:3", A)),
        Case("ids are not sorted", edit("data/x/text", f"{A} ", "zoe-1 "), CHECK, ("data/x/text:2",)),
        Case("ids differ between files", without("data/x/text", B), CHECK, ("data/x/text", B)),
        Case("a label without media", without("data/x/wav.scp", B), CHECK, ("wav.scp", B)),
        Case("media without a label", without("data/x/utt2label", B), CHECK, ("utt2label", B)),
        Case("a text of no words", edit("data/x/text", "it was good", ""), CHECK, ("data/x/text:1", A)),
        Case("a text that is no UTF-8", write("data/x/text", b"ann-1 caf\xe9\n"), CHECK, ("data/x/text:1",)),
        Case("a command in wav.scp", edit("data/x/wav.scp", str(CLIP), "cat x |"), CHECK, ("wav.scp", A)),
        Case(
            "an id that does not begin with its speaker", edit("data/x/utt2spk", " ann", " eve"), CHECK, ("utt2spk", A)
        ),
        Case("a whole table is missing", remove("data/x/utt2spk"), CHECK, ("data/x/utt2spk",)),
        Case("no data directory there", remove("data/x"), CHECK, ("data/x",)),
    ],
    "Features": [
        Case("a value is NaN", feature_value("dump/train/ark/audio.1.ark", float("nan")), TRAIN, ("audio", "spk0-000")),
        Case("a value is infinite", feature_value("dump/train/ark/text.1.ark", float("inf")), TRAIN, ("text", "spk0")),
        Case("a set of another dimension", other_dimension, TRAIN, ("dump/valid/audio.scp", "7", "6")),
        Case("an ark is cut short", cut("dump/train/ark/video.1.ark", 0.5), TRAIN, ("dump/train/ark/video.1.ark",)),
        Case("an ark is missing", remove("dump/train/ark/video.1.ark"), TRAIN, ("dump/train/ark/video.1.ark",)),
        Case(
            "a line of an index is missing", without("dump/train/audio.scp", "spk0-000"), TRAIN, ("audio", "spk0-000")
        ),
        Case("a label is missing", without("dump/train/utt2label", "spk0-000"), TRAIN, ("utt2label", "spk0-000")),
        Case("no labels at all", remove("dump/train/utt2label"), TRAIN, ("dump/train/utt2label",)),
        Case(
            "no real text to learn from, but asked to",
            remove("dump/train/text.scp"),
            f"{TRAIN} --flows complete",
            ("dump/train/text.scp",),
        ),
        Case("a feature of valid is missing", remove("dump/valid/video.scp"), TRAIN, ("dump/valid/video.scp",)),
        Case(
            "a job of a feature has not run",
            nothing,
            "sdumc.bin.finish_dump --data-dir data/x --dump-dir dump/x --name audio --num-jobs 2",
            ("dump/x/ark/audio.1.json",),
        ),
    ],
    "Training and decoding": [
        Case("a loss that is not finite", nothing, f"{TRAIN} --lr 1e20 --warmup-epochs 0 --epochs 5", ("spk", "--lr")),
        Case(
            "a changed setting",
            nothing,
            TRAIN.replace("exp/new", "exp/old") + " --lr 0.5",
            ("exp/old", "lr: 0.0001 -> 0.5"),
        ),
        Case(
            "a damaged checkpoint",
            cut("exp/old/checkpoint.pt", 0.5),
            TRAIN.replace("exp/new", "exp/old"),
            ("exp/old/checkpoint.pt",),
        ),
        Case("another training in the same folder", hold_folder, TRAIN, ("exp/new",)),
        Case("a disk that is full (files limited to 20 kB)", small_files, TRAIN, ("exp/new", "kept")),
        Case("ranks without a place to meet", ranks_without_address, TRAIN, ("MASTER_ADDR",)),
        Case("no GPU", nothing, TRAIN.replace("--device cpu", "--device cuda"), ("--device cuda",)),
        Case("a model that is not there", remove("exp/old"), DECODE, ("exp/old",)),
        Case(
            "weights cut short", cut("exp/old/model.valid-best.safetensors", 0.5), DECODE, ("valid-best.safetensors",)
        ),
        Case("a feature that the condition needs", remove("dump/valid/text.scp"), DECODE, ("dump/valid/text.scp",)),
        Case("a prediction is no number", write("predictions.tsv", PREDICTIONS.format("ann", "x")), SCORE, (":3", B)),
        Case("a prediction is NaN", write("predictions.tsv", PREDICTIONS.format("ann", "nan")), SCORE, (":3", B)),
        Case("an id twice in predictions", write("predictions.tsv", PREDICTIONS.format("bob", 1)), SCORE, (":3", B)),
        Case(
            "an id is missing in predictions",
            write("predictions.tsv", PREDICTIONS.format("ann", 1)),
            f"{SCORE} --reference data/x/utt2label",
            ("ann-2",),
        ),
    ],
    "Models and files of others": [
        Case("a model's folder is missing", remove("models/encoder"), AUDIO, ("models/encoder",)),
        Case(
            "a model's folder without config.json",
            remove("models/encoder/config.json"),
            AUDIO,
            ("models/encoder", "config.json"),
        ),
        Case(
            "a model's folder without weights", remove("models/encoder/model.safetensors"), AUDIO, ("models/encoder",)
        ),
        Case("a model's weights cut short", cut("models/encoder/model.safetensors", 0.5), AUDIO, ("models/encoder",)),
        Case(
            "a pickle with code in it",
            evil_pickle,
            "sdumc.bin.import_toolkit --pickle evil.pkl --data-dir data --dump-dir dump",
            ("evil.pkl", "system"),
        ),
        Case(
            "a pickle cut short",
            both(evil_pickle, write("evil.pkl", pickle.dumps({"train": list(range(99))})[:-9])),
            "sdumc.bin.import_toolkit --pickle evil.pkl --data-dir data --dump-dir dump",
            ("evil.pkl",),
        ),
    ],
    "Options": [
        Case("an unknown option", nothing, f"{TRAIN} --learning-rate 1", ("--learning-rate",), 2),
        Case("an option without its value", nothing, f"{TRAIN} --lr", ("--lr",), 2),
        Case("a value that is no number", nothing, f"{TRAIN} --lr high", ("--lr", "high"), 2),
        Case(
            "an unknown key in YAML", write("c.yaml", "lrate: 1\n"), f"{TRAIN} --config c.yaml", ("c.yaml", "lrate"), 2
        ),
        Case("a key twice in YAML", write("c.yaml", "lr: 1\nlr: 2\n"), f"{TRAIN} --config c.yaml", ("c.yaml", "lr"), 2),
        Case("what is no YAML", write("c.yaml", "lr: [\n"), f"{TRAIN} --config c.yaml", ("c.yaml",), 2),
        Case("a settings file is missing", nothing, f"{TRAIN} --config none.yaml", ("none.yaml",), 2),
        Case("an unknown option of the recipe", nothing, f"{RUN} --seed 1", ("--seed",), 2),
        Case("an option of the recipe without its value", nothing, f"{RUN} --nj", ("--nj",), 2),
        Case("a command in a value", nothing, f"{RUN} --exp-tag '$(touch owned)'", ("--exp-tag", "touch"), 2),
        Case("a quote in a value", nothing, f'{RUN} --exp-tag "it\'s"', ("--exp-tag", "it's"), 2),
        Case("a stage that there is not", nothing, f"{RUN} --stop-stage 7", ("--stop-stage",), 2),
    ],
    "Jobs": [
        Case("a job that fails", nothing, "utils/run.py JOB=2 x.JOB.log test JOB -ne 2", ("x.2.log",)),
        Case("no jobs at all", nothing, "utils/run.py JOB=3:1 x.JOB.log true", ("JOB=3:1",), 2),
        Case("one log for several jobs", nothing, "utils/run.py JOB=1:2 x.log true", ("x.log",), 2),
        Case("an unknown option of a job", nothing, "utils/run.py --memory 4G x.log true", ("--memory",), 2),
        Case("an option of a job without its value", nothing, "utils/run.py --mem", ("--mem",), 2),
        Case("a command that is not there", nothing, "utils/run.py x.log no-such-command", ("x.log",), 127),
        Case("more jobs than utterances: nothing to do", nothing, f"{AUDIO} --shard 99/99", (), 0),
        Case("a job number that there is not", nothing, f"{AUDIO} --shard 3/2", ("3/2",)),
    ],
}


# ---------------------------------------------------------------------------------------------------------- running


def make_sound_files(folder: Path) -> None:
    """Clips, a data directory, features, a trained model and an encoder, all of them as they should be."""
    from helpers import tiny_models
    from helpers.dumps import make_dump
    from helpers.tiny_recipe import clip

    folder.mkdir()
    os.chdir(folder)
    texts = {A: "it was good", "ann-2": "so much", B: "not good at all", "bob-2": "very bad"}
    tables: dict[str, list[str]] = {n: [] for n in ("wav.scp", "video.scp", "text", "utt2spk", "utt2label")}
    Path("data/x/clips").mkdir(parents=True)
    for i, (utt, text) in enumerate(texts.items()):
        path = clip(Path(f"data/x/clips/{utt}.mp4"), 1.0, i)
        for name, value in zip(tables, (path, path, text, utt[:3], "1.0"), strict=True):
            tables[name].append(f"{utt} {value}\n")
    for name, lines in tables.items():
        Path("data/x", name).write_text("".join(lines))
    make_dump(Path("dump/train"), 12, 1)
    make_dump(Path("dump/valid"), 6, 2)
    tiny_models.wavlm(Path("models/encoder"))
    code, said = call(TRAIN.replace("exp/new", "exp/old"))
    assert code == 0, said


def call(command: str) -> tuple[int, str]:
    """Run a command line in this folder; our Python commands in this process, as each import takes seconds."""
    program, *words = shlex.split(command)
    if program.endswith(".sh") or program.endswith("run.py"):
        done = subprocess.run([ROOT / program, *words], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr
    if program.startswith("sdumc.bin."):
        done = call_here(program.removeprefix("sdumc.bin."), *words)
    else:
        done = script_here(ROOT / program, *words)
    return done.returncode, done.stdout + done.stderr


def try_case(group: str, case: Case) -> Result:
    case.spoil()
    with contextlib.ExitStack() as around:
        while PATCHES:
            around.enter_context(PATCHES.pop())
        code, said = call(case.command)
    while HELD:
        HELD.pop().close()
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error: " in line]
    if case.command.startswith("utils/run.py") and code != 2:  # which job, and its log
        errors = ["; ".join([line for line in lines if line.startswith("run.py: ")][:2])]
    message = "" if code == 0 else (errors or lines or [""])[0]
    message = message.replace(str(ROOT) + "/", "").replace(f"{Path.cwd()}", ".")
    result = Result(group, case.title, case.command, code, message)
    missing = [word for word in case.says if word not in message]
    if code != case.code or missing or "Traceback" in said or Path("owned").exists():
        result.wrong = f"expected code {case.code} and {missing} in the message; it said:\n{said[-3000:]}"
    return result


def try_all(work: Path) -> list[Result]:
    make_sound_files(work / "sound")
    results = []
    for group, cases in GROUPS.items():
        for case in cases:
            shutil.rmtree(work / "case", ignore_errors=True)
            shutil.copytree(work / "sound", work / "case")
            os.chdir(work / "case")
            results.append(try_case(group, case))
    os.chdir(ROOT)
    return results


# ------------------------------------------------------------------------------------------------------------- page


def shown(command: str) -> str:
    """A command line without what all of its kind have."""

    def short(text: str) -> str:
        text = text.replace("sdumc.bin.", "").replace(f" {SIZES.removesuffix(' --device cpu')}", "")
        return text.replace(" --device cpu", "").replace(RUN, "run.sh").replace("utils/run.py", "run.py")

    command = short(command)
    for name, value in (("train", TRAIN), ("decode", DECODE), ("score", SCORE), ("extract_audio", AUDIO)):
        for variant in (short(value), short(value).replace("exp/new", "exp/old")):
            command = command.replace(variant, f"{name} ...")
    return command


def code_span(text: str) -> str:
    """Markdown's code within a table."""
    text = text.replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def listing(results: list[Result]) -> str:
    """The page's section in Markdown."""
    lines = []
    for group in GROUPS:
        lines += [f"### {group}", "", "| what is wrong | command | code | message |", "|---|---|---|---|"]
        for r in results:
            if r.group == group:
                message = code_span(r.message) if r.message else "none"
                lines.append(f"| {r.title} | {code_span(shown(r.command))} | {r.code} | {message} |")
        lines.append("")
    return "\n".join(lines)


def without_numbers(text: str) -> str:
    """What stays the same on other machines: no numbers, nor what a library says in parentheses."""
    return re.sub(r"\([^()]*\)", "()", re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?|\bnan\b|\binf\b", "#", text))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, help="page to write the list into")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args()
    page, output = (path and path.resolve() for path in (args.page, args.json))
    with tempfile.TemporaryDirectory(prefix="sdumc-bad-inputs-") as work:
        results = try_all(Path(work).resolve())
    for r in results:
        print(f"{'WRONG ' if r.wrong else ''}{r.title}: {r.code} {r.message}")
        if r.wrong:
            print(r.wrong)
    if output:
        output.write_text(json.dumps([asdict(r) for r in results], indent=1))
    if page:
        from helpers.faults import replace_section

        replace_section(page, "bad inputs", listing(results))
    return int(any(r.wrong for r in results))


if __name__ == "__main__":
    sys.exit(main())
