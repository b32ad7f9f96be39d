"""tools/import_checkpoint.py: the released file becomes an exp folder, and what is not that file is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.commands import Done, call_here, script_here
from helpers.plain_network import plain_forward, released_weights
from helpers.shared import RELEASED_KEYS

from sdumc.data.shards import ShardWriter, merge_shards
from sdumc.data.tables import write_table
from sdumc.training.checkpoint import load_weights

ROOT = Path(__file__).resolve().parents[2]
DIMS = {"audio": 12, "text": 20, "video": 9}


def importing(source: Path, exp: Path, *more: str) -> Done:
    return script_here(ROOT / "tools/import_checkpoint.py", source, exp, *more)


def save(path: Path, weights: dict[str, torch.Tensor]) -> Path:
    torch.save({"epoch": 7, "state_dict": {f"model.{k}": v for k, v in weights.items()}}, path)
    return path


@pytest.fixture
def dump(tmp_path) -> tuple[Path, dict]:
    """Five utterances, none as long as another, as features from elsewhere."""
    rng = np.random.default_rng(0)
    frames = {}
    folder = tmp_path / "dump"
    folder.mkdir()
    for name in ("audio", "text", "text_sim", "video"):
        dim = DIMS["text" if name == "text_sim" else name]
        writer = ShardWriter(folder, name, 1, {})
        for i in range(5):
            x = rng.normal(size=(2 + 3 * i, dim)).astype(np.float32)
            frames[f"u{i}", name] = torch.from_numpy(x)
            writer.write(f"u{i}", x)
        writer.commit()
        writer.finish()
        merge_shards(folder, name, 1, {"dim": dim}, [f"u{i}" for i in range(5)])
    write_table(folder / "utt2label", {f"u{i}": str(i / 3) for i in range(5)})
    return folder, frames


@pytest.mark.parametrize("imagination", ["none", "both"])
def test_decoding_an_imported_checkpoint_equals_the_plain_network(tmp_path, dump, imagination):
    weights = released_weights(tuple(DIMS.values()))
    folder, frames = dump
    more = ("--imagination", imagination, "--mask-padding", "true")
    done = importing(save(tmp_path / "released.pt", weights), tmp_path / "exp", *more)
    assert done.returncode == 0, done.stderr
    options = ["--exp-dir", tmp_path / "exp", "--data-dir", folder, "--output-dir", tmp_path / "out"]
    done = call_here("decode", *options, "--condition", "full", "missing")
    assert done.returncode == 0, done.stderr
    for condition, text, imagine in (("full", "text", False), ("missing", "text_sim", imagination == "both")):
        lines = (tmp_path / "out" / condition / "predictions.tsv").read_text().splitlines()[1:]
        for line in lines:
            utt, prediction, _ = line.split("\t")
            x = {"audio": frames[utt, "audio"], "text": frames[utt, text], "video": frames[utt, "video"]}
            assert float(prediction) == pytest.approx(
                float(plain_forward(weights, x, (imagine, imagine))["prediction"]), abs=1e-5
            )


@pytest.mark.skipif(not RELEASED_KEYS.exists(), reason=f"no list of the released file's keys: no {RELEASED_KEYS}")
def test_the_keys_and_shapes_of_the_released_file(tmp_path):
    rows = [line.split("\t") for line in RELEASED_KEYS.read_text().splitlines()[1:]]
    weights = {k: torch.zeros([int(n) for n in shape.split("x")]) for k, shape in rows}
    torch.save({"state_dict": weights}, tmp_path / "released.pt")
    done = importing(tmp_path / "released.pt", tmp_path / "exp", "--imagination", "both")
    assert done.returncode == 0, done.stderr
    config = (tmp_path / "exp" / "config.yaml").read_text()
    assert all(line in config for line in ("audio-dim: 1024", "text-dim: 4096", "video-dim: 1024", "dim: 256"))
    assert f"{len(rows)} keys" in (tmp_path / "exp" / "IMPORTED.txt").read_text()


def test_what_is_not_the_released_file_is_refused(tmp_path):
    weights = released_weights(tuple(DIMS.values()))
    missing = {k: v for k, v in weights.items() if k != "fc_att.bias"}
    cases = {
        "missing model.fc_att.bias": save(tmp_path / "a.pt", missing),
        "unknown extra.weight": save(tmp_path / "b.pt", {**weights, "extra.weight": torch.zeros(1)}),
        "shapes that do not fit": save(tmp_path / "c.pt", {**weights, "video_mlp.3.weight": torch.zeros(2, 2)}),
    }
    torch.save([1, 2], tmp_path / "d.pt")
    cases["no `state_dict`"] = tmp_path / "d.pt"
    (tmp_path / "e.pt").write_bytes(b"not a checkpoint")
    cases["not a checkpoint"] = tmp_path / "e.pt"
    cases["no such file"] = tmp_path / "f.pt"
    for said, path in cases.items():
        done = importing(path, tmp_path / "exp")
        assert done.returncode == 1 and said in done.stderr and "Traceback" not in done.stderr, (said, done.stderr)
        assert not (tmp_path / "exp").exists()


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "harmed",))

    torch.save({"state_dict": Harm()}, tmp_path / "g.pt")
    done = importing(tmp_path / "g.pt", tmp_path / "exp")
    assert done.returncode == 1 and not (tmp_path / "harmed").exists() and "Traceback" not in done.stderr


def test_training_starts_from_the_released_file(tmp_path, dump):
    """`--init` with the file itself, and with the folder that importing it makes: the same weights, without a step."""
    weights = released_weights(tuple(DIMS.values()))
    folder, _ = dump
    released = save(tmp_path / "released.pt", weights)
    assert importing(released, tmp_path / "imported", "--imagination", "both", "--mask-padding", "true").returncode == 0
    config = yaml.safe_load((tmp_path / "imported/config.yaml").read_text())
    widths = ["--dim", config["dim"], "--content-dim", config["content-dim"]]
    for name, source in (("a", released), ("b", tmp_path / "imported")):
        done = call_here(
            *["train", "--train-dir", folder, "--valid-dir", folder, "--exp-dir", tmp_path / name, "--init", source],
            *[*widths, "--lr", 0, "--epochs", 1, "--device", "cpu"],
        )
        assert done.returncode == 0, done.stderr
        record = yaml.safe_load((tmp_path / name / "init.yaml").read_text())
        assert record["from"] == str(source) and not record["anew"], record
        ours, theirs = (load_weights(tmp_path / e / "model.valid-best.safetensors") for e in (name, "imported"))
        assert all(torch.equal(x, theirs[key]) for key, x in ours.items())
