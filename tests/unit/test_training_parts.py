"""The parts of a training run: its state, its checkpoint, the weights that are kept, the rows of an idle rank."""

from __future__ import annotations

import argparse

import pytest
import torch
from helpers.dumps import DIMS, make_dump

from sdumc.conditions import COMPLETE, MISSING
from sdumc.errors import UserError
from sdumc.files import read_yaml
from sdumc.hyperparameters import ModelConfig
from sdumc.model.network import SDUMC, empty_loss_inputs
from sdumc.training.checkpoint import (
    VALID_BEST,
    TrainingState,
    average_best,
    choose,
    epoch_file,
    get_rng,
    keep_best,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
    set_rng,
)
from sdumc.training.data import load_sets, with_dimensions
from sdumc.training.settings import get_parser


def small_model(**settings) -> SDUMC:
    torch.manual_seed(0)
    return SDUMC(ModelConfig(audio_dim=3, text_dim=4, video_dim=2, dim=8, content_dim=6, **settings))


@pytest.mark.parametrize("fusion", ["umca", "concat"])
def test_a_rank_without_rows_has_the_names_and_shapes_of_the_others(fusion):
    model = small_model(fusion=fusion)
    dims = {"audio": 3, "text": 4, "text_sim": 4, "video": 2}
    features = {name: torch.zeros(5, 2, dim) for name, dim in dims.items()}
    outputs = model(features, {name: torch.full((5,), 2) for name in dims}, (COMPLETE, MISSING))
    expected = {name: (0, *x.shape[1:]) for name, x in outputs[COMPLETE].loss_inputs().items()}
    assert {name: x.shape for name, x in empty_loss_inputs(model.config, torch.device("cpu")).items()} == expected


def test_state_goes_through_a_checkpoint(tmp_path):
    """Written in the middle of the second epoch, and taken over by a new process's empty state."""
    model = small_model()
    state = TrainingState(model, torch.optim.Adam(model.parameters(), lr=0.1))
    state.finish_step({"loss": torch.tensor(2.0)}, 3)
    state.finish_epoch({"epoch": 1, "choice": 0.5}, keep=2)
    model.output.bias.sum().backward()
    state.optimiser.step()
    state.finish_step({"loss": torch.tensor(1.5)}, 2)
    state.rng = [get_rng(torch.device("cpu"))]
    drawn = torch.rand(3)
    save_checkpoint(tmp_path / "checkpoint.pt", state.state_dict(), {"lr": 0.1})

    other = small_model(scale=0.3)
    fresh = TrainingState(other, torch.optim.Adam(other.parameters(), lr=0.1))
    saved = load_checkpoint(tmp_path / "checkpoint.pt", {"lr": 0.1})
    assert saved is not None
    fresh.load_state_dict(saved)
    set_rng(fresh.rng[0], torch.device("cpu"))
    assert torch.equal(torch.rand(3), drawn)
    assert (fresh.epoch, fresh.batches_done, fresh.step, fresh.sums) == (2, 1, 2, {"loss": 3.0})
    assert fresh.history == [{"epoch": 1, "choice": 0.5}] and fresh.ranking == [(0.5, 1)]
    assert torch.equal(other.output.bias, model.output.bias) and fresh.optimiser.state_dict()["state"]
    fresh.finish_epoch({"epoch": 2, "choice": 0.25}, keep=2)
    fresh.finish_epoch({"epoch": 3, "choice": 0.75}, keep=2)
    assert fresh.best_epochs == [2, 1]


def test_changed_settings_are_refused_by_name(tmp_path):
    path = tmp_path / "exp" / "checkpoint.pt"
    assert load_checkpoint(path, {"lr": 1}) is None
    save_checkpoint(path, {"step": 3}, {"lr": 1, "epochs": 2})
    assert load_checkpoint(path, {"lr": 1, "epochs": 5}, may_change={"epochs"}) == {"step": 3}
    with pytest.raises(
        UserError, match=r"exp: its checkpoint was made .*epochs: 2 -> 5; lr: 1 -> 0.5. .*give a new name"
    ):
        load_checkpoint(path, {"lr": 0.5, "epochs": 5}, elsewhere="a new name")
    with pytest.raises(UserError, match=r"checkpoint.pt: .*another version .*differ in name: epochs, steps. Go on"):
        load_checkpoint(path, {"lr": 1, "steps": 2})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"checkpoint.pt: damaged checkpoint"):
        load_checkpoint(path, {"lr": 1, "epochs": 2})


def test_best_weights_after_a_kill_between_two_writes(tmp_path):
    for epoch in (1, 2, 3):
        save_weights(epoch_file(tmp_path, epoch), {"x": torch.tensor([float(epoch)])})
    (tmp_path / VALID_BEST).write_bytes(epoch_file(tmp_path, 1).read_bytes())  # of before epoch 3 was best
    keep_best(tmp_path, [3, 1])
    assert load_weights(tmp_path / VALID_BEST)["x"] == 3
    assert sorted((tmp_path / "epochs").iterdir()) == [epoch_file(tmp_path, 1), epoch_file(tmp_path, 3)]
    average_best(tmp_path, [3, 1])
    assert load_weights(tmp_path / "model.averaged.safetensors")["x"] == 2


def test_dimensions_come_from_the_train_set_and_leave_the_settings_alone(tmp_path):
    make_dump(tmp_path / "train", 6, 1, absent={"video": set(range(6))})
    make_dump(tmp_path / "valid", 4, 2)
    words = ["--train-dir", str(tmp_path / "train"), "--valid-dir", str(tmp_path / "valid")]
    settings = get_parser().parse_args(words)
    train, _ = load_sets(settings)
    assert [*train.features] == ["audio", "text", "text_sim"]
    before = argparse.Namespace(**vars(settings))
    found = with_dimensions(settings, train)
    assert (found.audio_dim, found.text_dim, found.video_dim) == (DIMS["audio"], DIMS["text"], 0)
    assert settings == before
    with pytest.raises(UserError, match=r"--audio-dim 7, but .*audio.scp has 6"):
        with_dimensions(get_parser().parse_args([*words, "--audio-dim", "7"]), train)


def test_the_average_is_taken_unless_it_is_clearly_worse_on_valid(tmp_path):
    for epoch in (3, 5):
        save_weights(epoch_file(tmp_path, epoch), {"x": torch.tensor(float(epoch))})
    ranking = [(0.9, 5), (1.0, 3)]

    def chosen(averaged: float, ranking: list[tuple[float, int]]) -> tuple[float, list[int], float]:
        keep_best(tmp_path, [epoch for _, epoch in ranking])
        average_best(tmp_path, [epoch for _, epoch in ranking])
        mae, epochs = choose(tmp_path, ranking, averaged)
        assert read_yaml(tmp_path / "chosen.yaml") == {"epochs": epochs, "mae": mae}
        return mae, epochs, float(load_weights(tmp_path / "model.valid-best.safetensors")["x"])

    assert chosen(0.85, ranking) == (0.85, [3, 5], 4.0)
    assert chosen(0.94, ranking) == (0.94, [3, 5], 4.0)  # no clear lead of the best of many epochs
    assert chosen(0.95, ranking) == (0.9, [5], 5.0)  # the run goes on after the first choice: nothing of it is left
    assert chosen(0.85, ranking[:1]) == (0.9, [5], 5.0)
