"""Recognisers: CTC and Whisper folders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import tiny_models

from sdumc.errors import UserError
from sdumc.pretrained.recogniser import RATE, load_recogniser, windows


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def waves():
    return [tiny_models.wave(s, i) for i, s in enumerate([0.9, 0.2, 1.7])]


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_ctc(tmp_path, waves, norm):
    recogniser = load_recogniser(str(tiny_models.wavlm(tmp_path / "ctc", norm=norm, ctc=True)))
    assert recogniser.kind == "ctc"
    together = recogniser(waves)
    assert together == [recogniser([w])[0] for w in waves]
    # Greedy CTC by hand: most likely letter per frame, repeats merged, blanks left out.
    from sdumc.pretrained.speech_encoder import normalise

    with torch.no_grad():
        logits = recogniser.model(torch.from_numpy(normalise(waves[0]))[None]).logits[0]
    best = logits.argmax(-1).tolist()
    ids = [i for i, before in zip(best, [None, *best[:-1]], strict=True) if i != before]
    letters = recogniser.tokenizer.convert_ids_to_tokens(ids)
    text = "".join(" " if x == "|" else x for x in letters if x not in ("<pad>", "<s>", "</s>"))
    assert together[0].replace("<unk>", "") == " ".join(text.replace("<unk>", "").split())


def test_whisper_equals_generate(tmp_path, waves):
    folder = tiny_models.whisper(tmp_path / "whisper")
    recogniser = load_recogniser(str(folder), max_new_tokens=10)
    assert recogniser.kind == "whisper"
    names = recogniser.tokenizer.convert_ids_to_tokens(recogniser.start)
    assert names == ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    together = recogniser(waves)
    assert together == [recogniser([w])[0] for w in waves]
    assert any(together)
    features = recogniser.spectrogram(waves[:1], sampling_rate=RATE, return_tensors="pt").input_features
    tokens, made = list(recogniser.start), []
    for step in range(10):  # greedy by hand, without a cache
        with torch.no_grad():
            logits = recogniser.model(features, decoder_input_ids=torch.tensor([tokens])).logits[0, -1]
        logits[[0, 6] + ([1] if step == 0 else [])] = -torch.inf
        best = int(logits.argmax())
        if best == recogniser.eos:
            break
        tokens.append(best)
        made.append(best)
    assert together[0] == recogniser._text(made)
    german = load_recogniser(str(folder), language="de")
    assert german.start[1] == german.tokenizer.convert_tokens_to_ids("<|de|>")
    with pytest.raises(UserError, match=r"<\|xx\|>"):
        load_recogniser(str(folder), language="xx")


def test_long_clips_are_cut_where_it_is_quiet():
    wave = np.random.default_rng(0).normal(0, 1, 70 * RATE).astype(np.float32)
    wave[27 * RATE : 27 * RATE + 800] = 0
    parts = windows(wave)
    assert np.array_equal(np.concatenate(parts), wave)
    assert all(len(p) <= 30 * RATE for p in parts)
    assert abs(len(parts[0]) / RATE - 27.025) < 0.03
    assert [len(p) for p in windows(wave[:100])] == [100]


def test_other_models_are_refused(tmp_path):
    with pytest.raises(UserError, match="no recogniser"):
        load_recogniser(str(tiny_models.llama(tmp_path / "llm")))
    with pytest.raises(UserError, match="no such model folder"):
        load_recogniser(str(tmp_path / "nothing"))
