"""The fast start of `predict` and `demo`: stand-ins for what is not used, and trials that are remembered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_models

from sdumc.files import recall, remember
from sdumc.pretrained import internals, loading
from sdumc.pretrained.llm import SpeechLLM
from sdumc.pretrained.speech import SpeechEncoder, load_whole
from sdumc.pretrained.vision import VisionExtractor

HEAVY = ("sympy", "scipy.optimize", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint")
ENCODE = f"""
import sys
import numpy as np
import torch
from sdumc.pretrained.llm import SpeechLLM
from sdumc.pretrained.speech import SpeechEncoder, load_whole
from sdumc.pretrained.vision import VisionExtractor
rng = np.random.default_rng(1)
waves = [rng.normal(size=n).astype(np.float32) for n in (9000, 5000)]
encoder, llm, eye = SpeechEncoder("wavlm"), SpeechLLM("llama"), VisionExtractor("vit")
found = [x.numpy() for x in encoder(waves)]
prompted = llm.read([llm.embed([5, 6, 7])])
found += [torch.tensor(w.tokens).numpy() for w in llm.search(prompted, 2, 5, 1.0)]
found.append(eye([rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)]))
np.savez(sys.argv[1], *found)
loaded = [n for n in {HEAVY} if type(sys.modules.get(n)) is type(sys)]
print(",".join(loaded))
"""
FAST = "from sdumc.prediction.startup import start_fast\nstart_fast()\n"


def run_python(folder: Path, code: str, *args: str) -> str:
    env = {**os.environ, "SDUMC_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", code, *args], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_models.wavlm(folder / "wavlm")
    tiny_models.llama(folder / "llama")
    tiny_models.vit(folder / "vit")
    return folder


def test_a_fast_start_gives_the_same(models):
    """Bit for bit, whether the trial was made or remembered; and nothing heavy was imported."""
    run_python(models, ENCODE, "plain.npz")
    loaded = [run_python(models, FAST + ENCODE, name) for name in ("first.npz", "second.npz")]
    expected = np.load(models / "plain.npz")
    for name in ("first.npz", "second.npz"):
        found = np.load(models / name)
        assert expected.files == found.files
        for key in expected.files:
            np.testing.assert_array_equal(found[key], expected[key])
    kinds = [p.name.split("-")[0] for p in (models / "cache").iterdir()]
    assert kinds.count("trial") == 3
    if int(version("transformers").split(".")[0]) >= 5:  # older ones import other things
        assert loaded == ["", ""] and kinds.count("transformers") == 2


def test_the_real_modules_come_when_they_are_needed(models):
    code = (
        FAST
        + """
import sys, torch, sympy
from torch.distributed.tensor import DTensor
from scipy.optimize import linear_sum_assignment
assert not isinstance(torch.zeros(1), DTensor) and not isinstance(1, sympy.Integer)
assert "sympy.core" not in sys.modules
assert linear_sum_assignment([[1.0, 2.0], [2.0, 4.0]])[1].tolist() == [1, 0]
import sympy
x = sympy.Symbol("x")
assert sympy.diff(x**2, x) == 2 * x and isinstance(sympy.Integer(2), sympy.Integer)
assert torch.compile(lambda y: y + 1, backend="eager")(torch.ones(1)).item() == 2
class Mine(DTensor): pass
assert issubclass(Mine, DTensor)
import torch._dynamo
assert torch._dynamo.config.cache_size_limit > 0
print("fine")
"""
    )
    assert run_python(models, code) == "fine"


def test_what_the_stand_ins_cannot_do_is_imported(models):
    """An import that fails with the stand-ins is tried again with the real modules."""
    code = """
import importlib, sys
from sdumc.prediction import startup
real = importlib.import_module
def fail(name, package=None):
    if name == "transformers.masking_utils":
        raise TypeError("not with a stand-in")
    return real(name, package)
startup.importlib.import_module = fail
startup.import_transformers()
startup.importlib.import_module = real
import sympy, torch._dynamo, transformers.masking_utils
print(type(sys.modules["sympy"]) is type(sys), sympy.Integer(2) + 1)
"""
    assert run_python(models, code) == "True 3"


@pytest.fixture
def remembering(tmp_path, monkeypatch):
    """A cache of its own; counts the passes of the models through trials."""
    monkeypatch.setenv("SDUMC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "_remembers", True)
    return tmp_path / "cache"


def loads(monkeypatch, make) -> int:
    """How many trials loading a model makes."""
    count = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr("sdumc.pretrained.speech.try_clips", counted(loading.try_clips))
        patch.setattr("sdumc.pretrained.llm.find_attention", counted(internals.find_attention))
        patch.setattr(VisionExtractor, "_try", counted(VisionExtractor._try))
        make()
    return count


def test_a_model_that_passed_is_not_tried_again(tmp_path, models, remembering, monkeypatch):
    makers = {
        "wavlm": lambda: SpeechEncoder(str(models / "wavlm")),
        "llama": lambda: SpeechLLM(str(models / "llama")),
        "vit": lambda: VisionExtractor(str(models / "vit")),
    }
    for make in makers.values():
        assert (loads(monkeypatch, make), loads(monkeypatch, make)) == (1, 0)
    assert SpeechLLM(str(models / "llama")).attention.reach == {"full_attention": None}
    # Other settings, other weights, or a damaged memory: it is tried.
    assert loads(monkeypatch, lambda: SpeechEncoder(str(models / "wavlm"), layer=1)) == 1
    assert loads(monkeypatch, lambda: SpeechEncoder(str(models / "wavlm"), torch.bfloat16)) == 1
    other = tiny_models.wavlm(tmp_path / "wavlm", seed=7)
    assert loads(monkeypatch, lambda: SpeechEncoder(str(other))) == 1
    for file in remembering.iterdir():
        file.write_text(file.read_text()[:-9])
    assert loads(monkeypatch, makers["vit"]) == 1
    # Without being asked to, nothing is remembered.
    monkeypatch.setattr(loading, "_remembers", False)
    assert loads(monkeypatch, makers["vit"]) == 1


def test_a_memory_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SDUMC_CACHE", str(tmp_path / "file"))
    remember("x", [1, "a"], {"b": 2})
    assert recall("x", [1, "a"]) is None


def test_the_memory_is_found_by_its_key(tmp_path, monkeypatch):
    monkeypatch.setenv("SDUMC_CACHE", str(tmp_path))
    remember("x", [1, "a"], {"b": [2, None]})
    assert recall("x", [1, "a"]) == {"b": [2, None]}
    assert recall("x", [1, "b"]) is None
    assert recall("y", [1, "a"]) is None
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps({"key": [2], "value": 3}))
    assert recall("x", [1, "a"]) is None


@pytest.mark.parametrize("kind", ["wavlm", "group", "whisper", *tiny_models.SPEECH_KINDS])
def test_two_layers_of_an_encoder_share_its_weights(tmp_path, kind):
    """And neither changes what the other gives."""
    makers = {
        "wavlm": tiny_models.wavlm,
        "group": lambda folder: tiny_models.wavlm(folder, norm="group"),
        "whisper": tiny_models.whisper,
    }
    make = makers.get(kind, lambda folder: tiny_models.speech_model(folder, kind))
    folder = str(make(tmp_path / "model"))
    waves = [tiny_models.wave(0.6), tiny_models.wave(0.4, seed=1)]
    layers = (1, -1)
    expected = [SpeechEncoder(folder, layer=layer)(waves) for layer in layers]
    loaded = load_whole(folder, torch.float32, torch.device("cpu"))
    encoders = [SpeechEncoder(folder, layer=layer, loaded=loaded) for layer in layers]
    weights = {p.data_ptr() for p in loaded.parameters()}
    for i in (0, 1, 0):
        assert {p.data_ptr() for p in encoders[i].model.parameters()} <= weights
        for found, right in zip(encoders[i](waves), expected[i], strict=True):
            assert torch.equal(found, right)
