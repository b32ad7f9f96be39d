"""A whole recipe on tiny random models: clips, stages 2 to 5, all in a second or two a stage."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "egs/mini/local"))  # for the helpers that also run as scripts, without pytest's settings
PATHS = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
ENV = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SECONDS = (0.7, 1.3, 0.9, 1.1, 0.6, 1.0)
SMALL = ["--dim", "16", "--content-dim", "8", "--batch-size", "3", "--lr", "2e-2", "--epochs", "15"]
SMALL += ["--warmup-epochs", "0", "--dropout", "0", "--attention-dropout", "0", "--modality-dropout", "0"]


def clip(path: Path, seconds: float, seed: int) -> Path:
    """A little video: a moving gradient, and noise that changes its pitch."""
    from helpers import tiny_models
    from mini.clips import write_clip

    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:48, 0:64]
    colour = rng.uniform(0.2, 1, 3)
    frames = [
        np.stack([(127 * (1 + np.sin((x + y) / 9 + t * c))) for c in colour], axis=2).astype(np.uint8)
        for t in range(round(seconds * 10))
    ]
    write_clip(path, frames, 10, tiny_models.wave(seconds, seed), 16000)
    return path


def make_recipe(root: Path) -> Path:
    """Fill ``root`` as a recipe's folder: models, data/all, dump/all, exp/tiny with decode_all; gives exp/tiny.

    Must be called from ``root``: models' paths are recorded as the commands are given them, relative.
    """
    import torch

    from helpers import tiny_models
    from sdumc.bin import (
        decode,
        extract_audio,
        extract_text,
        extract_video,
        finish_dump,
        recognize,
        score,
        simulate_text,
    )
    from sdumc.pretrained.projector import Projector, save_projector

    assert Path.cwd() == root
    tiny_models.wavlm(Path("models/encoder"))
    tiny_models.wavlm(Path("models/ctc"), ctc=True)
    tiny_models.llama(Path("models/llm"), eos_bias=0.7, seed=1)
    tiny_models.vit(Path("models/vision"))
    torch.manual_seed(0)
    projector = Projector(encoder_dim=32, llm_dim=48, k=5, hidden=16)
    projector.linear2.weight.data *= 5  # loud enough for every clip to get another answer
    save_projector("exp/projector/projector.safetensors", projector)

    data, dump = Path("data/all"), Path("dump/all")
    tiny_models.data_dir(data, list(SECONDS))
    (data / "clips").mkdir()
    ids = [line.split()[0] for line in (data / "utt2spk").read_text().splitlines()]
    for i, utt in enumerate(ids):
        clip(data / "clips" / f"{utt}.mp4", SECONDS[i], i)
    for name in ("wav.scp", "video.scp"):
        (data / name).write_text("".join(f"{u} {data}/clips/{u}.mp4\n" for u in ids))
    (data / "utt2dur").unlink()

    places = ["--data-dir", str(data), "--dump-dir", str(dump)]
    common = [*places, "--device", "cpu", "--batch-size", "4"]
    reader = ["--encoder", "models/encoder", "--projector", "exp/projector", "--llm", "models/llm", "--layers", "-2"]
    level = ["--speech-test", "level"]  # the clips are noise
    recognize.main([*common, "--model", "models/ctc", *level])
    finish_dump.main([*places, "--name", "asr_hyp"])
    simulate_text.main([*common, *reader, "--max-new-tokens", "12", "--rescorer", "models/ctc", *level])
    extract_audio.main([*common, "--model", "models/encoder", "--layer", "-2"])
    extract_text.main([*common, *reader])
    extract_video.main([*common, "--model", "models/vision", "--fps", "5"])
    for name in ("text_sim", "audio", "text", "video"):
        finish_dump.main([*places, "--name", name])

    exp = Path("exp/tiny")
    train = ["--train-dir", str(dump), "--valid-dir", str(dump), "--exp-dir", str(exp), *SMALL, "--device", "cpu"]
    subprocess.run([sys.executable, "-m", "sdumc.bin.train", *train], env=ENV, check=True, capture_output=True)
    conditions = ["full", "missing", "video", "audio"]
    output = exp / "decode_all"
    given = ["--exp-dir", str(exp), "--data-dir", str(dump), "--output-dir", str(output), "--device", "cpu"]
    decode.main([*given, "--condition", *conditions])
    for condition in conditions:
        predictions = output / condition / "predictions.tsv"
        score.main(["--predictions", str(predictions), "--output", str(predictions.with_name("score.json"))])
    return root / exp


def predictions(exp: Path, condition: str) -> dict[str, float]:
    """What decoding said."""
    lines = (exp / "decode_all" / condition / "predictions.tsv").read_text().splitlines()[1:]
    return {utt: float(value) for utt, value, _ in (line.split("\t") for line in lines)}
