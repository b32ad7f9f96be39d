"""One rule for --device in every command, and which GPU a rank gets."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from helpers import tiny_models

from sdumc.errors import UserError
from sdumc.machine import pick_device

ROOT = Path(__file__).resolve().parents[2]
JOB = ["--data-dir", "data", "--dump-dir", "dump"]
READER = ["--encoder", "models/encoder", "--projector", "exp/projector", "--llm", "models/llm"]
ARGUMENTS = {
    "decode": ["--exp-dir", "exp/a", "--data-dir", "dump", "--output-dir", "out", "--condition", "full"],
    "demo": ["--exp-dir", "exp/a", "--port", "0"],
    "extract_audio": [*JOB, "--model", "models/encoder"],
    "extract_text": [*JOB, *READER],
    "extract_video": [*JOB, "--model", "models/vision"],
    "predict": ["--exp-dir", "exp/a", "clip.wav"],
    "recognize": [*JOB, "--model", "models/asr"],
    "simulate_text": [*JOB, *READER],
    "train": ["--train-dir", "dump", "--valid-dir", "dump", "--exp-dir", "exp/a"],
    "train_projector": [
        *("--encoder", "models/encoder", "--llm", "models/llm", "--output", "exp/projector"),
        *("--train-data-dir", "data", "--valid-data-dir", "data"),
    ],
}


def command(name: str):
    return importlib.import_module(f"sdumc.bin.{name}")


def device_action(name: str):
    return next((a for a in command(name).get_parser()._actions if "--device" in a.option_strings), None)


@pytest.fixture
def gpus(monkeypatch):
    """Pretend that this many GPUs are visible."""

    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Data and a clip, but no models: a command that does not refuse the device fails by another error."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_models.data_dir(folder / "data", [0.5, 0.6])
    (folder / "data" / "video.scp").write_text((folder / "data" / "wav.scp").read_text())
    (folder / "clip.wav").write_bytes(next((folder / "data" / "wav").iterdir()).read_bytes())
    return folder


def test_every_command_with_a_device_is_tried_here():
    names = [p.stem for p in (ROOT / "sdumc/bin").glob("[a-z]*.py")]
    assert {n for n in names if device_action(n)} == set(ARGUMENTS)
    assert len({device_action(n).help for n in ARGUMENTS}) == 1  # one help text


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_gpu_that_is_not_there_is_refused(name, device, gpus, inputs, monkeypatch):
    gpus(0)
    monkeypatch.chdir(inputs)
    before = sorted(inputs.rglob("*"))
    with pytest.raises(UserError, match=rf"--device {device}: no GPU is visible here .*use --device cpu"):
        command(name).main([*ARGUMENTS[name], "--device", device])
    assert sorted(inputs.rglob("*")) == before  # nothing was begun


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_word_that_is_no_device_is_a_usage_error(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(name).main([*ARGUMENTS[name], "--device", "gpu"])
    assert stopped.value.code == 2
    assert "expected auto, cpu, cuda or cuda:N, not gpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("visible", "name", "local_rank", "ranks", "expected"),
    [
        (0, "auto", 0, 1, "cpu"),
        (0, "cpu", 1, 2, "cpu"),
        (2, "cpu", 0, 1, "cpu"),
        (1, "auto", 0, 1, "cuda:0"),
        (4, "cuda", 3, 4, "cuda:3"),
        (4, "auto", 2, 8, "cuda:2"),  # two machines
        (1, "cuda", 3, 4, "cuda:0"),  # Slurm shows each rank its own GPU only
        (4, "cuda:3", 0, 1, "cuda:3"),
    ],
)
def test_the_device_of_a_rank(gpus, visible, name, local_rank, ranks, expected):
    gpus(visible)
    assert pick_device(name, local_rank, ranks) == torch.device(expected)


@pytest.mark.parametrize(
    ("visible", "name", "local_rank", "ranks", "said"),
    [
        (2, "cuda", 2, 3, "rank 2 of this machine has no GPU: only 2 are visible"),
        (2, "auto", 2, 3, "rank 2 of this machine has no GPU"),
        (2, "cuda:2", 0, 1, "--device cuda:2: .*numbers 0 to 1"),
        (2, "cuda:1", 0, 2, "--device cuda:1: one GPU is not for 2 ranks"),
        (1, "mps", 0, 1, "--device mps: expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_what_a_rank_cannot_have(gpus, visible, name, local_rank, ranks, said):
    gpus(visible)
    with pytest.raises(UserError, match=said):
        pick_device(name, local_rank, ranks)


def test_ranks_that_see_every_gpu_do_not_share_one(gpus):
    gpus(1)
    assert pick_device("cuda", 0, 2, own_gpu_only=False) == torch.device("cuda:0")
    with pytest.raises(UserError, match="rank 1 of this machine has no GPU: only one is visible; start fewer ranks"):
        pick_device("cuda", 1, 2, own_gpu_only=False)
