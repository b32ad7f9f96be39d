"""Model folders that are not what they should be: one line when they are loaded, which names the folder."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from helpers import tiny_models
from safetensors.torch import load_file, save_file

from sdumc.errors import UserError
from sdumc.pretrained.llm import SpeechLLM
from sdumc.pretrained.recogniser import load_recogniser
from sdumc.pretrained.speech import SpeechEncoder
from sdumc.pretrained.vision import VisionExtractor

LOADERS = {"llm": SpeechLLM, "wavlm": SpeechEncoder, "ctc": load_recogniser, "whisper": load_recogniser}
LOADERS["vit"] = VisionExtractor
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665abf3\nsize 13476925163\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "llm": tiny_models.llama(folder / "llm"),
        "wavlm": tiny_models.wavlm(folder / "wavlm"),
        "ctc": tiny_models.wavlm(folder / "ctc", ctc=True),
        "whisper": tiny_models.whisper(folder / "whisper"),
        "vit": tiny_models.vit(folder / "vit"),
    }


def settings(name, **values):
    def change(folder):
        file = folder / name
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**content, **values}))

    return change


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def without(*names):
    return lambda folder: [(folder / name).unlink(missing_ok=True) for name in names]


def weights(new):
    def change(folder):
        found = load_file(folder / "model.safetensors")
        save_file(dict(new(k, v) for k, v in found.items()), folder / "model.safetensors", {"format": "pt"})

    return change


def stored_as(dtype):
    return weights(lambda k, v: (k, v.to(dtype) if v.dim() == 2 and "proj" in k else v))


def renamed(old, new):
    return lambda folder: (folder / old).rename(folder / new)


def link(name):
    def change(folder):
        (folder / name).unlink()
        (folder / name).symlink_to("../../blobs/none")

    return change


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


def more_tokens(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["USER:"])
    tokenizer.save_pretrained(folder)


ADAPTER = settings("adapter_config.json", peft_type="LORA", base_model_name_or_path="lab/base", r=8)

CASES = {
    "quantised, unknown": ("llm", settings("config.json", quantization_config={"quant_method": "exl3"}), "exl3"),
    "quantised, no library": (
        "llm",
        settings("config.json", quantization_config={"quant_method": "awq", "bits": 4}),
        "cannot be loaded",
    ),
    "fp8": ("llm", stored_as(torch.float8_e4m3fn), "weights are quantised .*F8_E4M3"),
    "int8": ("wavlm", stored_as(torch.int8), "weights are quantised .*I8"),
    "gptq": (
        "llm",
        weights(lambda k, v: (k.replace("proj.weight", "proj.qweight"), v)),
        "weights are quantised .*qweight",
    ),
    "gguf": ("llm", both(without("config.json"), text("m.gguf", "GGUF")), "no config.json, but m.gguf, a form"),
    "gguf and config": ("llm", renamed("model.safetensors", "m.gguf"), "but m.gguf, a form that is not read"),
    "adapter": ("llm", both(without("config.json"), ADAPTER), "but a PEFT adapter of lab/base: merge"),
    "adapter beside": ("llm", ADAPTER, "beside the model is a PEFT adapter"),
    "pointer, weights": (
        "llm",
        text("model.safetensors", POINTER),
        "Git LFS .*: model.safetensors; run `git lfs pull`",
    ),
    "pointer, tokenizer": ("llm", text("tokenizer.json", POINTER), "Git LFS .*: tokenizer.json"),
    "no pickle": (
        "vit",
        both(without("model.safetensors"), text("pytorch_model.bin", "<html>")),
        "cut short: pytorch_model.bin",
    ),
    "link, config": ("vit", link("config.json"), "links to files that are not there: config.json"),
    "link, weights": ("ctc", link("model.safetensors"), "links to files that are not there: model.safetensors"),
    "own code": (
        "llm",
        settings("config.json", model_type="mine", auto_map={"AutoModelForCausalLM": "m.M"}),
        r"a mine model is none that this transformers knows, and code that comes with a model .* is not run; give",
    ),
    "own code, encoder": (
        "wavlm",
        settings("config.json", model_type="mine"),
        "a mine model is none .* knows; give a speech enc",
    ),
    "heads": (
        "llm",
        settings("config.json", num_attention_heads=5),
        "config.json: cannot be used: .* multiple|have other sizes",
    ),
    "sizes": ("vit", settings("config.json", hidden_size=48), r"weights have other sizes than config.json says, e.g. "),
    "generation config": ("llm", text("generation_config.json", "{nonsense"), "generation_config.json: not valid JSON"),
    "end as text": ("llm", settings("generation_config.json", eos_token_id=["</s>"]), "must be numbers, not '</s>'"),
    "tokens": ("llm", more_tokens, r"gives 'USER:' the number 27, but the model has 27 tokens"),
    "8 kHz": ("wavlm", settings("preprocessor_config.json", sampling_rate=8000), "hears sound of 8000 Hz"),
    "24 kHz": ("ctc", settings("preprocessor_config.json", sampling_rate=24000), "hears sound of 24000 Hz"),
    "48 kHz": ("whisper", settings("preprocessor_config.json", sampling_rate=48000), "hears sound of 48000 Hz"),
    "128 bands": ("whisper", settings("preprocessor_config.json", feature_size=128), "Whisper model cannot be used: "),
    "no preprocessor": ("whisper", without("preprocessor_config.json"), "there is no preprocessor_config.json"),
    "no image processor": ("vit", without("preprocessor_config.json"), "there is no preprocessor_config.json"),
    "image processor": (
        "vit",
        settings("preprocessor_config.json", image_processor_type="Mine"),
        "its image processor cannot be loaded: Unrecognized",
    ),
    "NaN": (
        "whisper",
        weights(lambda k, v: (k, v * float("nan") if k.endswith("fc1.weight") else v)),
        "computes NaN or infinity in float32",
    ),
    "other letters": (
        "ctc",
        text("vocab.json", json.dumps({c: i for i, c in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"abc"])})),
        "has names for 7 of the model's 32 outputs",
    ),
    "no blank": ("ctc", settings("tokenizer_config.json", pad_token="[PAD]"), r"is '\[PAD\]' \(32\), none of the"),
}


@pytest.mark.parametrize("case", CASES)
def test_is_refused_in_a_line(good, tmp_path, case):
    kind, change, reason = CASES[case]
    folder = tmp_path / "model"
    shutil.copytree(good[kind], folder)
    change(folder)
    with pytest.raises(UserError, match=reason) as caught:
        LOADERS[kind](str(folder))
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(folder))


def test_a_tokenizers_own_code_is_not_asked_for(good, tmp_path, monkeypatch):
    """transformers asks on the terminal whether to run it, and takes a Yes."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    shutil.copytree(good["llm"], tmp_path / "llm")
    names = {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    settings("tokenizer_config.json", **names)(tmp_path / "llm")
    with pytest.raises(UserError, match="its tokenizer cannot be loaded"):
        SpeechLLM(str(tmp_path / "llm"))


def test_layers_that_the_config_leaves_out_are_named(good, tmp_path, caplog):
    shutil.copytree(good["llm"], tmp_path / "llm")
    settings("config.json", num_hidden_layers=3)(tmp_path / "llm")
    SpeechLLM(str(tmp_path / "llm"))
    assert "fewer layers than the files: model.layers.3." in caplog.text
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "sdumc"):
        SpeechLLM(str(good["llm"]))
    assert "fewer layers" not in caplog.text
    assert "a short trial as llm passed" in caplog.text


def test_a_folder_without_the_right_to_read(good, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(good["llm"]), "iterdir", refuse)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        SpeechLLM(str(good["llm"]))


def test_end_tokens_that_the_model_does_not_have_do_not_count(good, tmp_path):
    shutil.copytree(good["llm"], tmp_path / "llm")
    settings("generation_config.json", eos_token_id=[2, 99999])(tmp_path / "llm")
    assert SpeechLLM(str(tmp_path / "llm")).eos_ids == [2]
