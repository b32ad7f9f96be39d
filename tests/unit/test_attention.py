"""Attention over frames of a few utterances: which are kept, what is kept, and the file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.dumps import make_dump

from sdumc.bin.decode import main
from sdumc.conditions import MISSING
from sdumc.data.batches import UtteranceDataset, collate
from sdumc.errors import UserError
from sdumc.hyperparameters import ModelConfig
from sdumc.model.network import SDUMC
from sdumc.scoring.attention import drawn_at_random, read_attention, write_attention
from sdumc.scoring.decoding import attend, decode, load_for, worth_keeping


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    path = make_dump(tmp_path_factory.mktemp("dump") / "test", count=30, absent={"video": {2}, "text_sim": {3}})
    return load_for(path, ["full", "missing"])


def network(**changes) -> SDUMC:
    torch.manual_seed(0)
    return SDUMC(ModelConfig(audio_dim=6, text_dim=10, video_dim=5, dim=16, content_dim=8, **changes)).eval()


def test_the_worst_and_some_others_are_kept(dump):
    decoded = decode(network(), dump, "missing")
    kept = worth_keeping(decoded, worst=5, drawn=3)
    error = dict(zip(decoded.ids, np.abs(decoded.prediction - decoded.label), strict=True))
    worst = sorted(error, key=error.get)[-5:]
    drawn = drawn_at_random(dump.utterances, 3)
    assert set(kept) == set(worst) | set(drawn) and kept == sorted(kept)
    decoded.label[:] = np.nan
    assert worth_keeping(decoded, worst=5, drawn=3) == drawn
    assert drawn_at_random(["a"], 3) == ["a"] and drawn_at_random([]) == []


def test_attention_is_that_of_the_utterance_alone(dump):
    model = network()
    kept = attend(model, dump, "missing", dump.utterances)
    dataset = UtteranceDataset(dump, ["audio", "text_sim", "video"])
    for i, utt in enumerate(dump.utterances):
        batch = collate([dataset[i]])
        features = {n: x for n, x in batch.features.items() if batch.lengths[n][0]}
        lengths = {n: batch.lengths[n] for n in features}
        with torch.inference_mode():
            alone = model(features, lengths, flows=(MISSING,), with_attention=True)[MISSING].attention
        there = {"text" if n == "text_sim" else n for n in features}
        assert set(kept[utt]) == there
        for m in there:
            np.testing.assert_allclose(kept[utt][m], alone[m][0].numpy(), atol=1e-6)
            np.testing.assert_allclose(kept[utt][m].sum(axis=1), 1, atol=1e-5)
    assert "video" not in kept[dump.utterances[2]] and "text" not in kept[dump.utterances[3]]
    assert attend(network(fusion="concat"), dump, "missing", dump.utterances) == {}


def test_file_is_read_back(dump, tmp_path):
    kept = attend(network(), dump, "full", dump.utterances[:9])
    write_attention(kept, tmp_path)
    found = read_attention(tmp_path)
    assert list(found) == dump.utterances[:9]
    for utt, by_modality in kept.items():
        assert set(found[utt]) == set(by_modality)
        for m, a in by_modality.items():
            np.testing.assert_allclose(found[utt][m], a, atol=5e-4)
    path = tmp_path / "attention.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"attention\.npz: cannot be read"):
        read_attention(tmp_path)
    write_attention({}, tmp_path)
    assert not path.exists() and read_attention(tmp_path) == {}


def test_decoding_writes_it(dump, tmp_path, monkeypatch):
    monkeypatch.setattr("sdumc.training.checkpoint.load_model", lambda *_: network())
    given = ["--exp-dir", str(tmp_path), "--data-dir", str(dump.path), "--output-dir", str(tmp_path / "o")]
    main([*given, "--condition", "full", "missing", "none", "--device", "cpu"])
    for condition, names in (("full", {"audio", "text", "video"}), ("none", {"audio", "video"})):
        found = read_attention(tmp_path / "o" / condition)
        assert 24 <= len(found) <= 30
        assert set().union(*found.values()) == names
