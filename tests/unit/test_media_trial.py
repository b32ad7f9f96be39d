"""The trial at load: models that give another result in a batch are run one clip at a time, or refused in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import tiny_models

from sdumc.errors import UserError
from sdumc.pretrained.loading import same, trial_waves, try_clips
from sdumc.pretrained.recogniser import load_recogniser
from sdumc.pretrained.speech import SpeechEncoder, normalise

ALONE = {"hubert, batch norm", "data2vec-audio", "conformer", "sew"}  # in every layer behind the first


@pytest.fixture(scope="module")
def waves():
    return [tiny_models.wave(s, i) for i, s in enumerate([0.9, 0.31, 1.4, 0.05])]


@pytest.mark.parametrize("kind", tiny_models.SPEECH_KINDS)
@pytest.mark.parametrize("layer", [-1, -2])
def test_encoders_give_the_same_in_a_batch_as_transformers_alone(tmp_path, waves, kind, layer):
    from transformers import AutoModel

    folder = tiny_models.speech_model(tmp_path / "model", kind)
    encoder = SpeechEncoder(str(folder), layer=layer)
    if (kind, layer) != ("sew", -2):  # there, versions of transformers differ
        assert encoder.one_by_one == (kind in ALONE or (kind == "wav2vec2, adapter" and layer == -1))
    model = AutoModel.from_pretrained(folder).eval()
    for wave, frames in zip(waves, encoder(waves), strict=True):
        wave = normalise(wave)
        if len(wave) < 2000:
            wave = np.pad(wave, (0, 2000 - len(wave)))
        with torch.no_grad():
            output = model(torch.from_numpy(wave)[None], output_hidden_states=True)
        expected = output.last_hidden_state if layer == -1 else output.hidden_states[-2]
        assert frames.shape == expected[0].shape == (encoder.num_frames(len(wave)), encoder.dim)
        torch.testing.assert_close(frames, expected[0], rtol=1e-4, atol=1e-4)
    halved = kind == ("wav2vec2, adapter" if layer == -1 else "sew")
    assert encoder.frame_rate == (25 if halved else 50)


@pytest.mark.parametrize("kind", tiny_models.SPEECH_KINDS)
def test_recognisers_write_the_same_in_a_batch_as_alone(tmp_path, waves, kind):
    recogniser = load_recogniser(str(tiny_models.speech_model(tmp_path / "model", kind, ctc=True)))
    together = recogniser(waves)
    assert together == [recogniser([w])[0] for w in waves]
    assert recogniser.one_by_one == (kind in ALONE or kind == "wav2vec2, adapter")
    assert any(together)


def test_a_recogniser_that_reads_spectrograms(tmp_path, waves):
    folder = tiny_models.wav2vec2_bert_ctc(tmp_path / "model")
    recogniser = load_recogniser(str(folder))
    together = recogniser(waves)
    assert together == [recogniser([w])[0] for w in waves]
    assert any(together)
    inputs = recogniser.features([waves[0]], sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        best = recogniser.model(**inputs).logits[0].argmax(-1)
    assert together[0] == " ".join(recogniser.tokenizer.decode(best).replace("<s>", "").replace("</s>", "").split())
    with pytest.raises(UserError, match="a wav2vec2-bert model reads spectrograms, and its feature extractor"):
        load_recogniser(str(tiny_models.wav2vec2_bert_ctc(tmp_path / "bare", features=False)))
    with pytest.raises(UserError, match="is not a speech encoder"):
        SpeechEncoder(str(folder))


def test_parakeet(tmp_path, waves):
    try:
        folder = tiny_models.parakeet_ctc(tmp_path / "model")
    except ImportError:
        pytest.skip("transformers is too old for Parakeet")
    try:
        recogniser = load_recogniser(str(folder))
    except UserError as e:  # transformers 4 needs librosa for it
        assert "reads spectrograms, and its feature extractor cannot be loaded" in str(e) and "librosa" in str(e)
        return
    assert recogniser(waves) == [recogniser([w])[0] for w in waves]


def test_a_tokenizer_that_keeps_repetitions_is_refused(tmp_path):
    from transformers import AutoTokenizer

    folder = tiny_models.wavlm(tmp_path / "ctc", ctc=True)
    for name in ("vocab.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)
    AutoTokenizer.from_pretrained(tiny_models.llama(tmp_path / "llm")).save_pretrained(folder)
    with pytest.raises(UserError, match="is not one for CTC"):
        load_recogniser(str(folder))


# ---- the trial itself


def frames_of(wave):
    return torch.from_numpy(wave[: len(wave) // 100 * 100].reshape(-1, 100)).clone()


def outcome(compute, dtype=torch.float32):
    return try_clips(compute, lambda n: n // 100, dtype, "x")[0]


def test_trial_finds_what_depends_on_the_batch():
    assert not outcome(lambda waves: [frames_of(w) for w in waves])
    assert outcome(lambda waves: [frames_of(w) * (1 + 0.05 * (len(waves) > 1)) for w in waves])
    assert outcome(lambda waves: [frames_of(w)[: 30 if len(waves) > 1 else None] for w in waves])

    def only_alone(waves):
        (wave,) = waves
        return [frames_of(wave)]

    assert outcome(only_alone)


def test_trial_refuses_what_is_wrong_alone():
    def broken(_waves):
        raise RuntimeError("\n  the shape is wrong\nmore")

    with pytest.raises(UserError, match=r"^x: the shape is wrong$"):
        outcome(broken)
    with pytest.raises(UserError, match=r"x: 48 frames for 0\.6 s of sound, where 96 are expected"):
        outcome(lambda waves: [frames_of(w)[::2] for w in waves])
    with pytest.raises(UserError, match="its output is not finite in float16"):
        outcome(lambda waves: [frames_of(w) / 0 for w in waves], torch.float16)
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="another result each time"):
        outcome(lambda waves: [frames_of(w) + float(rng.normal()) for w in waves])


def test_tolerance_is_that_of_the_number_format():
    frames = [frames_of(w) for w in trial_waves()]
    rounded = {d: [x.to(d) for x in frames] for d in (torch.bfloat16, torch.float16)}
    assert all(same(frames, x, d) for d, x in rounded.items())
    off = [x + 0.3 * x.std() for x in frames]
    assert not any(same(frames, off, d) for d in (torch.float32, torch.float16, torch.bfloat16))
    # A dimension with values far above the others does not hide a difference in these.
    large, large_off = ([torch.cat([1000 + x[:, :1], x[:, 1:]], 1) for x in part] for part in (frames, off))
    assert not same(large, large_off, torch.float32)
