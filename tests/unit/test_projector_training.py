"""Training the projector on tiny models: what it writes, kills and signals, changed settings, too little memory."""

from __future__ import annotations

import logging
import os
import signal

import pytest
import torch
import yaml
from helpers import tiny_models
from safetensors.torch import load_file

from sdumc.bin import simulate_text, train_projector
from sdumc.errors import EXIT_REQUEUE, UserError
from sdumc.machine import installed_versions
from sdumc.pretrained.speech import projector_data
from sdumc.training import checkpoint
from sdumc.training import projector as training
from sdumc.training.checkpoint import hold_folder

FILES = {"projector.safetensors", "config.yaml", "train.log", "train_utterances"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    root = tmp_path_factory.mktemp("work")
    tiny_models.wavlm(root / "encoder")
    tiny_models.llama(root / "llm", eos_bias=0.7, seed=1)
    tiny_models.data_dir(root / "data", [0.5, 1.3, 0.9, 0.7, 1.1, 0.6, 0.8, 1.0, 0.4])
    return root


@pytest.fixture(autouse=True)
def restored_signals():
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def train(work, output, *more: str) -> int:
    """12 steps, a checkpoint after 5 and 10, the loss on valid after 4, 8 and 12; ``more`` overrides."""
    return train_projector.main(
        [
            *("--train-data-dir", str(work / "data"), "--valid-data-dir", str(work / "data")),
            *("--encoder", str(work / "encoder"), "--llm", str(work / "llm"), "--device", "cpu", "--hidden", "16"),
            *("--steps", "12", "--batch-size", "4", "--learning-rate", "0.01", "--warmup-steps", "2"),
            *("--valid-interval", "4", "--checkpoint-interval", "5", "--wer-utterances", "2", "--max-new-tokens", "5"),
            *("--output", str(output), *more),
        ]
    )


@pytest.fixture(scope="module")
def undisturbed(work, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "projector"
    assert train(work, output) == 0
    return output


def weights(folder) -> bytes:
    return (folder / "projector.safetensors").read_bytes()


def test_what_is_written(undisturbed):
    assert {p.name for p in undisturbed.iterdir()} == FILES
    assert [p.name for p in undisturbed.parent.iterdir()] == ["projector"]
    config = yaml.safe_load((undisturbed / "config.yaml").read_text())
    assert config["result"]["valid_wer"] is not None
    assert config["embedding_scale"] == 1.0
    assert config["versions"] == installed_versions() and "transformers" in config["versions"]
    lines = (undisturbed / "train.log").read_text().splitlines()
    losses = [float(line.split()[-1]) for line in lines if ": valid loss" in line and "WER" not in line]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_it_goes_with_its_prompt(work, undisturbed, tmp_path):
    words = ["--data-dir", work / "data", "--dump-dir", tmp_path, "--encoder", work / "encoder", "--llm", work / "llm"]
    with pytest.raises(UserError, match="trained with the prompt"):
        simulate_text.main([*map(str, words), "--projector", str(undisturbed), "--prompt", "long"])
    with pytest.raises(UserError, match="trained with the prompt template 'released'"):
        simulate_text.main([*map(str, words), "--projector", str(undisturbed), "--prompt-template", "Q: {prompt}"])
    assert yaml.safe_load((undisturbed / "config.yaml").read_text())["prompt_template"] == "released"


def test_it_says_what_it_was_trained_on(work, undisturbed, tmp_path):
    ids = [line.split()[0] for line in (work / "data" / "wav.scp").read_text().splitlines()]
    known = projector_data(str(undisturbed), [*ids[:2], "another"])
    assert known == {"projector_data": str(work / "data"), "projector_saw": 2}
    released = tmp_path / "projector.pt"
    assert projector_data(str(released), ids) == {"projector_data": None, "projector_saw": None}


def test_a_killed_run_ends_with_the_same_projector(work, undisturbed, tmp_path, monkeypatch):
    """Killed at step 9: after the checkpoint of step 5, and after a better loss on valid than the checkpoint knows."""
    steps, original = [], training.learning_rate

    def dying(step, settings):
        steps.append(step)
        if step == 9 and len(steps) == 10:
            raise KeyboardInterrupt
        return original(step, settings)

    monkeypatch.setattr(training, "learning_rate", dying)
    with pytest.raises(KeyboardInterrupt):
        train(work, tmp_path / "killed")
    assert not (tmp_path / "killed").exists()
    assert train(work, tmp_path / "killed") == 0
    assert steps[10:] == list(range(5, 12))
    assert weights(tmp_path / "killed") == weights(undisturbed)


def test_killed_while_the_best_is_measured(work, undisturbed, tmp_path, monkeypatch):
    def dying(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "measure_best", dying)
        with pytest.raises(KeyboardInterrupt):
            train(work, tmp_path / "killed")
    monkeypatch.setattr(training, "learning_rate", dying)  # no step is done again
    assert train(work, tmp_path / "killed") == 0
    assert weights(tmp_path / "killed") == weights(undisturbed)
    results = [yaml.safe_load((p / "config.yaml").read_text())["result"] for p in (tmp_path / "killed", undisturbed)]
    assert results[0] == results[1]


def test_a_signal_saves_and_asks_for_another_turn(work, undisturbed, tmp_path, monkeypatch):
    original = training.learning_rate

    def signalled(step, settings):
        if step == 6:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(step, settings)

    with monkeypatch.context() as patch:
        patch.setattr(training, "learning_rate", signalled)
        assert train(work, tmp_path / "stopped") == EXIT_REQUEUE
    assert not (tmp_path / "stopped").exists()
    assert train(work, tmp_path / "stopped") == 0
    log = (tmp_path / "stopped/train.log").read_text()
    assert "stopped by a signal at step 7" in log and "resuming after step 7" in log
    assert weights(tmp_path / "stopped") == weights(undisturbed)


def test_changed_settings_are_refused_by_name(work, tmp_path, monkeypatch):
    def dying(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "measure_best", dying)
        with pytest.raises(KeyboardInterrupt):
            train(work, tmp_path / "p", "--steps", "2")
    with pytest.raises(UserError, match=r"p\.partial: .*batch_size: 4 -> 3; steps: 2 -> 4\. .*give another --output "):
        train(work, tmp_path / "p", "--steps", "4", "--batch-size", "3")
    (work / "moved").symlink_to(work / "encoder")  # the same encoder elsewhere
    assert train(work, tmp_path / "p", "--steps", "2", "--encoder", str(work / "moved")) == 0


def test_two_trainings_of_one_projector(work, tmp_path, monkeypatch):
    monkeypatch.setattr("sdumc.training.checkpoint.lock_folder.__defaults__", (0.1,))
    refused = pytest.raises(UserError, match=r"projector\.partial: another training works in this folder")
    with hold_folder(training.partial_folder(tmp_path / "projector")), refused:
        train(work, tmp_path / "projector")
    assert train(work, tmp_path / "projector") == 0


def test_a_folder_that_got_its_final_name_while_it_was_waited_for(tmp_path, monkeypatch):
    """The lock that is got at last is in the finished folder; the one that waited makes a folder of its own."""
    real, folder = checkpoint.lock_folder, tmp_path / "new"

    def lock_late(path):
        descriptor = real(path)
        if not (tmp_path / "finished").exists():
            path.rename(tmp_path / "finished")
        return descriptor

    monkeypatch.setattr(checkpoint, "lock_folder", lock_late)
    with hold_folder(folder):
        assert (folder / checkpoint.LOCK).exists()


def test_in_parts(work, tmp_path, monkeypatch, caplog):
    """Two clips at once are too many for the memory: the batch goes in parts, with the same gradients."""
    assert train(work, tmp_path / "whole", "--steps", "4") == 0
    original, sizes = training.answer_loss, []

    def small(llm, contexts, answers):
        sizes.append(len(answers))
        if len(answers) > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return original(llm, contexts, answers)

    limit = 1
    monkeypatch.setattr(training, "answer_loss", small)
    with caplog.at_level(logging.WARNING, logger="sdumc"):
        assert train(work, tmp_path / "parts", "--steps", "4") == 0
    assert sizes[:4] == [4, 2, 1, 1]
    a, b = (load_file(tmp_path / name / "projector.safetensors") for name in ("whole", "parts"))
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], atol=1e-4, rtol=1e-3)
    assert "going on with parts of 1" in (tmp_path / "parts/train.log").read_text()
    limit = 0
    with pytest.raises(UserError, match="one utterance alone does not fit"):
        train(work, tmp_path / "none")
