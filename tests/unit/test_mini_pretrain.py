"""The mini recipe's "pretrained" models: tokenizer, spelling, batches, and a few steps of each training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import make_corpus
import pretrain
from mini import llm, training
from mini.corpus import read_corpus
from sdumc.errors import UserError

TEXTS = ["the movie was not very good", "honestly the book was bad", "we thought the music was fine"]
SMALL = ["--num-pretrain", "8", "--num-train", "1", "--num-valid", "1", "--num-test", "1"]
SMALL += [
    "--num-pretrain-speakers",
    "2",
    "--num-train-speakers",
    "1",
    "--num-valid-speakers",
    "1",
    "--num-test-speakers",
    "1",
]
STEPS = ["--encoder-front-steps", "2", "--encoder-steps", "2", "--llm-steps", "2", "--vision-steps", "2"]


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory):
    pytest.importorskip("espeakng_loader")
    folder = tmp_path_factory.mktemp("mini") / "corpus"
    make_corpus.main(["--output-dir", str(folder), "--jobs", "1", *SMALL])
    return folder


@pytest.fixture(scope="module")
def models_dir(corpus_dir):
    folder = corpus_dir.parent / "models"
    pretrain.main(["--corpus-dir", str(corpus_dir), "--models-dir", str(folder), "--jobs", "1", *STEPS])
    return folder


def test_words_are_tokens_and_any_text_can_be_encoded():
    tokenizer = llm.build_tokenizer(TEXTS)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text
    for text in ("zebra", "Don't you?", "naïve — 你好 👍", "a\nb\tc", "", " "):
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokenizer("naïve 你好").input_ids, skip_special_tokens=True) == "naïve 你好"
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    special = {tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert special == {0, 1, 2, 3}


def test_an_answer_is_the_same_tokens_after_the_prompt():
    tokenizer = llm.build_tokenizer(TEXTS)
    chat, alone = tokenizer(llm.CHAT)["input_ids"], tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    assert tokenizer(llm.CHAT + TEXTS[0])["input_ids"] == chat + alone
    assert len(chat) < 16


def test_spelling_averages_letters():
    letters = {c: i for i, c in enumerate(" abcdefghijklmnopqrstuvwxyz")}
    settings = llm.LanguageSettings(deletions=0, substitutions=0)
    weights = llm.spell("hello", letters, np.random.default_rng(0), settings)
    assert weights.shape[1] == 27 and np.allclose(weights.sum(1), 1, atol=1e-5) and (weights >= 0).all()
    seen = {c for c, i in letters.items() if weights[:, i].sum() > 0}
    assert seen <= set(" helo") and len(seen) > 2


def test_batches_cover_everything():
    lengths = np.random.default_rng(0).integers(1, 100, 37)
    stream = training.batches(np.random.default_rng(1), lengths, 4)
    seen: list[int] = []
    while len(seen) < 37:
        seen += next(stream)
    assert sorted(seen) == list(range(37))


def test_models_load_as_any_others_do(models_dir, corpus_dir):
    from transformers import (
        AutoFeatureExtractor,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForCTC,
        AutoProcessor,
        AutoTokenizer,
    )

    wave = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    extractor = AutoFeatureExtractor.from_pretrained(models_dir / "encoder")
    encoder = AutoModel.from_pretrained(models_dir / "encoder").eval()
    with torch.no_grad():
        frames = encoder(**extractor(wave, sampling_rate=16000, return_tensors="pt")).last_hidden_state
    assert encoder.config.model_type == "wavlm" and frames.shape[0::2] == (1, encoder.config.hidden_size)
    assert frames.shape[1] == 23  # of 40 ms each, those that fit

    processor = AutoProcessor.from_pretrained(models_dir / "ctc")
    ctc = AutoModelForCTC.from_pretrained(models_dir / "ctc").eval()
    with torch.no_grad():
        logits = ctc(**processor(wave, sampling_rate=16000, return_tensors="pt")).logits
    assert isinstance(processor.batch_decode(logits.argmax(-1))[0], str)
    text = "we've said"
    assert processor.decode(processor(text=text).input_ids, group_tokens=False) == text

    tokenizer = AutoTokenizer.from_pretrained(models_dir / "llm")
    model = AutoModelForCausalLM.from_pretrained(models_dir / "llm").eval()
    inputs = tokenizer(["the movie", "honestly the book was bad"], return_tensors="pt", padding=True)
    assert model.config.model_type == "llama" and model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[0] == 2
    words = {w for row in read_corpus(corpus_dir) for w in row.text.split()}
    assert all(len(tokenizer(w, add_special_tokens=False).input_ids) == 1 for w in words)

    from sdumc.pretrained.vision import VisionExtractor

    extract = VisionExtractor(str(models_dir / "vision"))
    assert extract([np.zeros((96, 96, 3), np.uint8)] * 2).shape == (2, 64)


def _weights(folder):
    return {p.parent.name: p.read_bytes() for p in folder.rglob("*.safetensors")}


@pytest.mark.slow
def test_same_seed_same_weights_also_in_parallel(models_dir, corpus_dir, tmp_path):
    again = ["--corpus-dir", str(corpus_dir), "--models-dir", str(tmp_path / "again"), "--jobs", "2", *STEPS]
    pretrain.main(again)
    assert _weights(tmp_path / "again") == _weights(models_dir)
    assert set(_weights(models_dir)) == {"encoder", "ctc", "llm", "vision"}


def test_a_model_is_there_whole_or_as_it_was(tmp_path):
    def half(folder):
        (folder / "config.json").write_text("half")
        raise OSError("disk full")

    folder = tmp_path / "models" / "llm"
    with pytest.raises(OSError, match="disk full"):
        training.save_whole(folder, half)
    assert not folder.exists()
    for content in ("one", "two"):
        training.save_whole(folder, lambda path, content=content: (path / "config.json").write_text(content))
        assert (folder / "config.json").read_text() == content
    with pytest.raises(OSError, match="disk full"):
        training.save_whole(folder, half)
    assert (folder / "config.json").read_text() == "two"


def test_refusals(tmp_path):
    options = ["--corpus-dir", str(tmp_path), "--models-dir", str(tmp_path / "models")]
    for what in ("encoder", "llm", "vision"):
        with pytest.raises(UserError, match="make the corpus first"):
            pretrain.main([*options, "--what", what])
    with pytest.raises(UserError, match="--llm-steps must be at least 1"):
        pretrain.main([*options, "--llm-steps", "0"])
    assert not (tmp_path / "models").exists()
