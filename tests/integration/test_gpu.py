"""What needs a GPU: every stage gives what it gives on the CPU, training goes on after a kill, memory runs out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_models
from helpers.commands import call_here
from helpers.dumps import make_dump
from helpers.stopping import at_step
from helpers.tiny_recipe import make_recipe
from safetensors.torch import load_file

from sdumc.bin import (
    decode,
    extract_audio,
    extract_text,
    extract_video,
    finish_dump,
    recognize,
    simulate_text,
    train_projector,
)
from sdumc.data.dump import load_dump, load_matrix
from sdumc.data.tables import read_table
from sdumc.errors import UserError
from sdumc.machine import halve_when_out_of_memory
from sdumc.prediction.scorer import Scorer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible here")

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}  # conftest.py has put this repository on PYTHONPATH
SMALL = ["--dim", "16", "--content-dim", "8", "--batch-size", "8", "--lr", "1e-3", "--epochs", "4", "--save-every", "2"]
PLAIN = ["--dropout", "0", "--attention-dropout", "0", "--modality-dropout", "0"]
GUARD = 600  # seconds: more than any command here needs


@pytest.fixture(scope="module")
def exp(tmp_path_factory):
    """A recipe whose features and model were made on the CPU."""
    root = tmp_path_factory.mktemp("recipe").resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        return make_recipe(root)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    make_dump(root / "train", 41, 1, absent={"video": {3, 4}, "text_sim": {7}, "text": {9}})
    make_dump(root / "valid", 11, 2)
    return root


def train(data: Path, exp: Path, *more: object, env=ENV, device: str = "cuda") -> subprocess.CompletedProcess:
    words = ["--train-dir", data / "train", "--valid-dir", data / "valid", "--exp-dir", exp, "--device", device]
    line = [sys.executable, "-m", "sdumc.bin.train", *map(str, [*words, *SMALL, *more])]
    return subprocess.run(line, env=env, capture_output=True, text=True, timeout=GUARD)


def weights(exp: Path) -> dict[str, torch.Tensor]:
    return load_file(exp / "model.averaged.safetensors")


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference of a weight."""
    assert a.keys() == b.keys()
    return max(float((a[n].float() - b[n].float()).abs().max()) for n in a)


def test_features_and_transcripts_are_those_of_the_cpu(exp, monkeypatch):
    monkeypatch.chdir(exp.parents[1])
    places = ["--data-dir", "data/all", "--dump-dir", "dump/gpu"]
    common = [*places, "--device", "cuda", "--batch-size", "4"]
    reader = ["--encoder", "models/encoder", "--projector", "exp/projector", "--llm", "models/llm", "--layers", "-2"]
    level = ["--speech-test", "level"]
    cpu_texts = {n: read_table(f"data/all/{n}", allow_empty=True) for n in ("text_sim", "text_asr")}
    recognize.main([*common, "--model", "models/ctc", *level])
    finish_dump.main([*places, "--name", "asr_hyp"])
    simulate_text.main([*common, *reader, "--max-new-tokens", "12", *level])
    extract_audio.main([*common, "--model", "models/encoder", "--layer", "-2"])
    extract_text.main([*common, *reader])
    extract_video.main([*common, "--model", "models/vision", "--fps", "5"])
    for name in ("text_sim", "audio", "text", "video"):
        finish_dump.main([*places, "--name", name])
    assert {n: read_table(f"data/all/{n}", allow_empty=True) for n in cpu_texts} == cpu_texts
    cpu, gpu = load_dump("dump/all"), load_dump("dump/gpu")
    assert gpu.features.keys() == cpu.features.keys()
    for name, feature in cpu.features.items():
        assert gpu.features[name].entries.keys() == feature.entries.keys()
        for utterance, entry in feature.entries.items():
            there, here = load_matrix(entry), load_matrix(gpu.features[name].entries[utterance])
            assert there.shape == here.shape
            assert np.abs(there - here).max() <= 2e-3 * np.abs(there).max(), (name, utterance)


def test_decoding_and_predict_score_as_on_the_cpu(exp, monkeypatch, tmp_path):
    monkeypatch.chdir(exp.parents[1])
    words = ["--exp-dir", "exp/tiny", "--data-dir", "dump/all", "--output-dir", str(tmp_path), "--device", "cuda"]
    decode.main([*words, "--condition", "full", "missing", "video"])
    for condition in ("full", "missing", "video"):
        tables = [folder / condition / "predictions.tsv" for folder in (tmp_path, Path("exp/tiny/decode_all"))]
        gpu, cpu = ([line.split("\t") for line in table.read_text().splitlines()[1:]] for table in tables)
        assert [row[0] for row in gpu] == [row[0] for row in cpu]
        assert [float(row[1]) for row in gpu] == pytest.approx([float(row[1]) for row in cpu], abs=1e-3)
    clip = min(Path("data/all/clips").iterdir())
    (there,), (here,) = (Scorer.load(exp, device=d).score(clip).utterances for d in ("cpu", "cuda"))
    assert there.transcript == here.transcript
    assert here.score == pytest.approx(there.score, abs=2e-3)


def test_training_learns_what_the_cpu_learns(data, tmp_path):
    for device in ("cpu", "cuda"):
        done = train(data, tmp_path / device, *PLAIN, device=device)
        assert done.returncode == 0, done.stderr
    assert apart(weights(tmp_path / "cpu"), weights(tmp_path / "cuda")) < 1e-3


def test_a_killed_training_goes_on(data, tmp_path):
    """Dropout is drawn on the GPU: its generator's state must be in the checkpoint."""
    assert (done := train(data, tmp_path / "whole")).returncode == 0, done.stderr
    killed = train(data, tmp_path / "killed", env=at_step(ENV, 9, signal.SIGKILL))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (done := train(data, tmp_path / "killed")).returncode == 0, done.stderr
    assert "resum" in done.stderr or "going on" in done.stderr
    assert apart(weights(tmp_path / "whole"), weights(tmp_path / "killed")) < 1e-6


@pytest.mark.parametrize("options", [["--precision", "bf16"], ["--compile", "yes"]], ids=["bf16", "compile"])
def test_faster_ways_to_train(data, tmp_path, options):
    assert (done := train(data, tmp_path / "plain", *PLAIN)).returncode == 0, done.stderr
    assert (done := train(data, tmp_path / "other", *PLAIN, *options)).returncode == 0, done.stderr
    assert apart(weights(tmp_path / "plain"), weights(tmp_path / "other")) < 0.05


def test_the_projector_trains_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_models.wavlm(Path("encoder"))
    tiny_models.llama(Path("llm"), eos_bias=0.7, seed=1)
    tiny_models.data_dir(Path("data"), [0.5, 1.3, 0.9, 0.7, 1.1, 0.6, 0.8])
    found = {}
    for device in ("cpu", "cuda"):
        words = "--train-data-dir data --valid-data-dir data --encoder encoder --llm llm --hidden 16 --steps 6"
        words += " --batch-size 4 --learning-rate 0.01 --warmup-steps 2 --valid-interval 3 --checkpoint-interval 3"
        words += f" --wer-utterances 2 --max-new-tokens 5 --output {device} --device {device}"
        assert train_projector.main(words.split()) == 0
        found[device] = load_file(f"{device}/projector.safetensors")
    assert apart(found["cpu"], found["cuda"]) < 0.02


def test_batches_are_halved_when_the_gpu_is_really_full():
    """An allocation that fails, not an exception that a test raises."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 2**30 / total))
    sizes = []

    def compute(items):
        block = torch.empty(len(items) * 2**26, device="cuda")  # 256 MiB each
        sizes.append(len(items))
        return [float(block[0] * 0) for _ in items]

    try:
        assert len(halve_when_out_of_memory(list(range(8)), compute)) == 8
        assert max(sizes) < 8 and sum(sizes) == 8
        with pytest.raises(UserError, match="'large' alone does not fit into the GPU's memory"):
            halve_when_out_of_memory(["large"], lambda _: [torch.empty(2**30, device="cuda")])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="no GPU is visible here alone")
def test_more_ranks_than_gpus_are_refused(data, tmp_path):
    words = ["--train-dir", data / "train", "--valid-dir", data / "valid", "--exp-dir", tmp_path / "two"]
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sdumc.bin.train"]
    line = [sys.executable, *line, *map(str, [*words, *SMALL, "--device", "cuda"])]
    done = subprocess.run(line, env=ENV, capture_output=True, text=True, timeout=GUARD)
    assert done.returncode != 0
    assert "start fewer ranks" in done.stderr


def test_a_gpu_that_is_not_there():
    done = call_here("train", *["--train-dir", "a", "--valid-dir", "a", "--exp-dir", "b", "--device", "cuda:99"])
    assert done.returncode == 1 and "cuda:99" in done.stderr, done.stderr
