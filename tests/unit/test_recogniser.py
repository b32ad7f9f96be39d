"""Recognisers: CTC and Whisper folders."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers import tiny_models

from sdumc.errors import UserError
from sdumc.pretrained.recogniser import Heard, load_recogniser, windows
from sdumc.pretrained.speech import RATE


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
    from sdumc.pretrained.speech import normalise

    with torch.no_grad():
        logits = recogniser.model(torch.from_numpy(normalise(waves[0]))[None]).logits[0]
    best = logits.argmax(-1).tolist()
    ids = [i for i, before in zip(best, [None, *best[:-1]], strict=True) if i != before]
    letters = recogniser.tokenizer.convert_ids_to_tokens(ids)
    text = "".join(" " if x == "|" else x for x in letters if x not in ("<pad>", "<s>", "</s>"))
    assert together[0].replace("<unk>", "") == " ".join(text.replace("<unk>", "").split())


def test_ctc_gives_the_probability_of_a_text(tmp_path, waves):
    """Of all paths through the frames of a clip so short that they can be counted."""
    recogniser = load_recogniser(str(tiny_models.wavlm(tmp_path / "ctc", ctc=True)))
    short = waves[1][:1100]
    (log_probs,) = (x.log_softmax(-1).tolist() for x in recogniser._scores([short]))
    assert len(log_probs) == 6
    wanted, blank = recogniser.tokenizer("ab").input_ids, recogniser.tokenizer.pad_token_id
    total = 0.0
    for path in itertools.product([blank, *wanted], repeat=6):
        if [i for i, _ in itertools.groupby(path) if i != blank] == wanted:
            total += np.exp(sum(log_probs[t][i] for t, i in enumerate(path)))
    texts = ["ab", "AB", "a, b?", "abababa", ""]
    (found,) = recogniser.log_probabilities([short], [texts])
    assert found[0] == found[1] == pytest.approx(np.log(total), abs=1e-4)
    assert found[3] == -np.inf  # seven letters in six frames
    assert np.isfinite(found[2]) and np.isfinite(found[4])
    texts = [["the film"], ["good", "bad"], [""]]
    together = recogniser.log_probabilities(waves, texts)
    for wave, candidates, scores in zip(waves, texts, together, strict=True):
        assert scores == pytest.approx(recogniser.log_probabilities([wave], [candidates])[0], abs=1e-3)


def test_whisper_gives_the_probability_of_a_text(tmp_path, waves):
    """As the loss of training on the text."""
    recogniser = load_recogniser(str(tiny_models.whisper(tmp_path / "whisper")), max_new_tokens=10)
    long = tiny_models.wave(31.0, 3)
    found = recogniser.log_probabilities([waves[0], long], [["the film was good", "bad"], ["good", "bad"]])
    assert found[1] == [0.0, 0.0] and found[0][0] != found[0][1]
    names = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    start = [recogniser.tokenizer.convert_tokens_to_ids(n) for n in names]
    answer = recogniser.tokenizer(" the film was good", add_special_tokens=False).input_ids
    features = recogniser.spectrogram([waves[0]], sampling_rate=RATE, return_tensors="pt").input_features
    labels = torch.tensor([[-100] * 3 + answer + [recogniser.generation.eos_token_id]])
    with torch.no_grad():
        loss = recogniser.model(features, decoder_input_ids=torch.tensor([start + answer]), labels=labels).loss
    assert found[0][0] == pytest.approx(-float(loss) * (len(answer) + 1), abs=1e-3)


def greedy(recogniser, wave, limit=10):
    """Transcript, mean log-probability and probability of no speech, by hand and without a cache."""
    names = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    tokens = [recogniser.tokenizer.convert_tokens_to_ids(n) for n in names]
    none = recogniser.tokenizer.convert_tokens_to_ids("<|nospeech|>")
    features = recogniser.spectrogram([wave], sampling_rate=RATE, return_tensors="pt").input_features
    made, scores = [], []
    with torch.no_grad():
        start = recogniser.model(features, decoder_input_ids=torch.tensor([tokens])).logits[0, 0]
        for step in range(limit):
            logits = recogniser.model(features, decoder_input_ids=torch.tensor([tokens])).logits[0, -1]
            logits[[0, *range(17, len(logits))] + ([1] if step == 0 else [])] = -torch.inf
            best = int(logits.argmax())
            scores.append(float(logits.log_softmax(-1)[best]))
            if best == 1:
                break
            tokens.append(best)
            made.append(best)
    return recogniser.tokenizer.decode(made), float(np.mean(scores)), float(start.softmax(-1)[none])


def test_whisper_is_that_of_transformers(tmp_path, waves):
    folder = tiny_models.whisper(tmp_path / "whisper")
    recogniser = load_recogniser(str(folder), max_new_tokens=10)
    assert recogniser.kind == "whisper"
    assert not recogniser.has_time_stamps
    together = recogniser.hear(waves)
    assert together == [recogniser.hear([w])[0] for w in waves]
    assert recogniser(waves) == [h.text for h in together]
    sure = 0
    for wave, heard in zip(waves, together, strict=True):
        text, score, none = greedy(recogniser, wave)
        if heard.temperature == 0:
            sure += 1
            assert heard.no_speech == (score < -1 and none > 0.6)
            assert heard.text == ("" if heard.no_speech else text)
            assert abs(heard.log_probability - score) < 2e-3
    assert sure
    german = load_recogniser(str(folder), language="de")
    assert german.generation.lang_to_id == {"<|de|>": german.tokenizer.convert_tokens_to_ids("<|de|>")}
    with pytest.raises(UserError, match=r"<\|xx\|>"):
        load_recogniser(str(folder), language="xx")


def biased(recogniser, token, by):
    """A hook that makes one token more probable."""
    index = recogniser.tokenizer.convert_tokens_to_ids(token)

    def add(_module, _inputs, logits):
        logits[..., index] += by
        return logits

    return recogniser.model.proj_out.register_forward_hook(add)


def test_whispers_decisions(tmp_path, waves):
    recogniser = load_recogniser(str(tiny_models.whisper(tmp_path / "whisper")), max_new_tokens=10)
    handle = recogniser.model.proj_out.register_forward_hook(lambda _m, _i, logits: logits * 0.01)
    unsure = recogniser.hear(waves)  # all words are as probable: -log of their number, at every temperature
    assert [h.temperature for h in unsure] == [1.0] * 3
    assert all(h.log_probability < -2 and not h.no_speech for h in unsure)
    assert unsure == [recogniser.hear([w])[0] for w in reversed(waves)][::-1]  # sampled with a fixed seed
    with biased(recogniser, "<|nospeech|>", 20):
        silent = recogniser.hear(waves)
    assert [(h.text, h.no_speech, h.temperature) for h in silent] == [("", True, 0.0)] * 3
    handle.remove()
    with biased(recogniser, "film", 100):
        (looped,) = recogniser.hear(waves[:1])
    assert looped.log_probability > -0.01
    assert set(looped.text.split()) == {"film"}


def test_a_long_clip_without_time_stamps(tmp_path):
    recogniser = load_recogniser(str(tiny_models.whisper(tmp_path / "whisper")), max_new_tokens=10)
    wave = tiny_models.wave(33)
    (heard,) = recogniser.hear([wave])
    parts = recogniser.hear(windows(wave))
    assert len(parts) == 2
    assert heard.text == " ".join(p.text for p in parts if p.text)
    assert heard.temperature == max(p.temperature for p in parts)


def test_transcripts_note_how_they_came_about():
    from sdumc.extraction.features import _transcript

    assert _transcript(Heard("the film")).notes == {"hyp": "the film", "status": "ok"}
    assert _transcript(Heard("", no_speech=True, log_probability=-1.5)).notes == {
        "hyp": "",
        "status": "no-speech",
        "log_probability": "-1.500",
    }
    sampled = _transcript(Heard("film", temperature=0.4, log_probability=-0.8)).notes
    assert (sampled["fallback"], sampled["temperature"], sampled["status"]) == ("temperature", "0.4", "ok")


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
