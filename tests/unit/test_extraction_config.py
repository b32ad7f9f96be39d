"""The recipes' settings of stages 2 and 3 pass their commands' own parsers and agree with each other."""

from pathlib import Path

import pytest

from sdumc.bin import extract_audio, extract_text, extract_video, recognize, simulate_text, train_projector

EGS = Path(__file__).resolve().parents[2] / "egs"
JOB = ["--data-dir", "data/x", "--dump-dir", "dump/x"]
LLM = ["--encoder", "e", "--projector", "p", "--llm", "l"]
COMMANDS = {
    "projector": (train_projector, ["--train-data-dir", "d", "--output", "o", "--encoder", "e", "--llm", "l"]),
    "simulation": (simulate_text, [*JOB, *LLM]),
    "asr": (recognize, [*JOB, "--model", "m"]),
    "audio": (extract_audio, [*JOB, "--model", "m"]),
    "text": (extract_text, [*JOB, *LLM]),
    "text_released": (extract_text, [*JOB, "--llm", "l"]),
    "video": (extract_video, [*JOB, "--model", "m"]),
}


def parse(recipe, name, *more):
    command, needed = COMMANDS[name]
    return command.get_parser().parse_args([*needed, "--config", str(EGS / recipe / f"{name}.yaml"), *more])


@pytest.mark.parametrize(
    "recipe", ["mini/conf", "mosei/conf", "mosei/conf/small", "mosi/conf/small", "sims/conf", "sims/conf/small"]
)
def test_settings_are_accepted_and_agree(recipe):
    found = {name: parse(recipe, name) for name in COMMANDS if (EGS / recipe / f"{name}.yaml").exists()}
    assert set(found) >= set(COMMANDS) - {"text_released"}
    text, simulated = found["text"], found["simulation"]
    for option in ("prompt", "prompt_template", "layers", "first_state", "dtype", "encoder_layer"):
        assert getattr(text, option) == getattr(simulated, option), option
    assert text.context == "audio+prompt"
    assert found["projector"].prompt == simulated.prompt
    assert found["projector"].prompt_template == simulated.prompt_template
    assert all(isinstance(layer, int) for layer in simulated.layers)


def test_layers_on_the_command_line():
    assert parse("mini/conf", "simulation", "--layers", "-4", "-3", "-2", "-1").layers == [-4, -3, -2, -1]
    assert parse("mosei/conf", "text_released").first_state == "keep"


def test_unknown_keys_are_refused(tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("layer: [-1]\n")
    command, needed = COMMANDS["simulation"]
    with pytest.raises(SystemExit):
        command.get_parser().parse_args([*needed, "--config", str(tmp_path / "bad.yaml")])
    assert "layer" in capsys.readouterr().err
