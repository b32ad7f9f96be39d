"""Real small models, Whisper-tiny and SmolLM2-135M, where they are: a recogniser that hears, an LLM that reads.

They are looked for in SDUMC_TEST_REAL_MODELS. Where that is not set, the script beside the repository fetches 620 MB
and makes them once for this machine, in the user's cache folder (XDG_CACHE_HOME, ~/.cache).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from helpers.shared import REAL_MODELS

from sdumc.bin import extract_text, finish_dump, recognize
from sdumc.data.dump import load_dump, load_matrix
from sdumc.data.tables import read_table
from sdumc.errors import UserError
from sdumc.files import read_json
from sdumc.pretrained.loading import whole_weights

pytestmark = pytest.mark.slow
SENTENCES = {"good": "the movie was really good and i loved it", "bad": "i did not like this boring film at all"}


NAMES = ("whisper-tiny", "smollm2-135m-instruct")


def are_whole(folder: Path) -> bool:
    try:
        return all((folder / name / "config.json").is_file() and whole_weights(folder / name) for name in NAMES)
    except UserError:
        return False


@pytest.fixture(scope="module")
def models() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdumc-tests"
    folder = Path(os.environ.get("SDUMC_TEST_REAL_MODELS", cache / "real-models"))
    partial = folder.with_name(f"{folder.name}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be making them
        if not are_whole(folder):
            if not REAL_MODELS.is_file():
                pytest.skip(f"real models: neither {folder} nor {REAL_MODELS} is there")
            shutil.rmtree(partial, ignore_errors=True)
            env = {**os.environ, "HF_HUB_OFFLINE": "0"}
            made = subprocess.run([sys.executable, REAL_MODELS, partial], env=env, capture_output=True, text=True)
            if made.returncode:
                pytest.skip(f"real models: {REAL_MODELS} cannot fetch them here: {made.stderr[-200:]}")
            for what in (".dl", ".site"):  # what was fetched
                shutil.rmtree(partial / what, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    return folder


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Path:
    """Two sentences read aloud, and two seconds of noise, of which Whisper-tiny makes a word."""
    from mini.speech import Synthesiser, Voice, scale

    root = tmp_path_factory.mktemp("spoken")
    data, say = root / "data", Synthesiser()
    data.mkdir()
    rng = np.random.default_rng(0)
    waves = {name: scale(say.say(text, Voice("en-us+m3", 140, 40, 50), 1), 0.2) for name, text in SENTENCES.items()}
    waves["noise"] = 0.1 * rng.normal(size=32000)
    for name, wave in waves.items():
        soundfile.write(root / f"{name}.wav", wave, 16000)
    (data / "wav.scp").write_text("".join(f"s-{name} {root / name}.wav\n" for name in sorted(waves)))
    (data / "utt2spk").write_text("".join(f"s-{name} s\n" for name in sorted(waves)))
    (data / "text").write_text("".join(f"s-{n} {SENTENCES.get(n, 'noise')}\n" for n in sorted(waves)))
    return root


def test_recognised_and_read(models, spoken):
    data, dump = spoken / "data", spoken / "dump"
    places = ["--data-dir", str(data), "--dump-dir", str(dump)]
    common = [*places, "--device", "cpu", "--batch-size", "4"]
    recognize.main([*common, "--model", str(models / "whisper-tiny"), "--max-new-tokens", "40"])
    finish_dump.main([*places, "--name", "asr_hyp"])
    quality = read_json(dump / "text_asr.quality.json", "")
    assert quality["counts"]["no-speech"] == 1 and quality["counts"]["ok"] == 2  # noise is no "you"
    words = read_table(data / "text_asr", allow_empty=True)
    heard = {name: set(words[f"s-{name}"].lower().replace(".", "").split()) for name in SENTENCES}
    assert words["s-noise"] == "" and len(heard["good"] & set(SENTENCES["good"].split())) >= 5
    assert -1 < quality["log_probability"]["mean"] < 0

    llm = ["--llm", str(models / "smollm2-135m-instruct"), "--layers", "-8", "--context", "prompt"]
    template = ["--prompt-template", "auto", "--name", "text_asr", "--text", str(data / "text_asr")]
    extract_text.main([*common, *llm, *template])
    finish_dump.main([*places, "--name", "text_asr"])
    feature = load_dump(dump, ["text_asr"], require=()).features["text_asr"]
    assert feature.dim == 576 and feature.frames["s-noise"] == 1 and feature.frames["s-good"] > 5
    assert np.isfinite(load_matrix(feature.entries["s-bad"])).all()
    assert "<|im_start|>user" in feature.meta["prompt_template"] and feature.meta["asr"]["model"].endswith(
        "whisper-tiny"
    )
