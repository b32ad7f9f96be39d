"""The network against a plain one, its independence of the batch, and absent modalities."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers.plain_network import plain_forward, released_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from sdumc.conditions import COMPLETE, MISSING
from sdumc.hyperparameters import ModelConfig
from sdumc.model import layers
from sdumc.model.network import SDUMC
from sdumc.training.initial import import_released

DIMS = {"audio": 12, "text": 20, "video": 9}


def imported(imagination="both", mask_padding=True, seed=0):
    w = released_weights(tuple(DIMS.values()), seed=seed)
    config, state, _ = import_released({f"model.{k}": v for k, v in w.items()}, imagination, mask_padding)
    model = SDUMC(config)
    model.load_state_dict(state)
    return model.eval(), w


def batch_of(utterances, names):
    features, lengths = {}, {}
    for name in names:
        frames = [u.get(name) for u in utterances]
        dim = DIMS["text" if name == "text_sim" else name]
        counts = [0 if f is None else len(f) for f in frames]
        x = torch.zeros(len(frames), max(1, *counts), dim)
        for row, f in zip(x, frames, strict=True):
            if f is not None:
                row[: len(f)] = f
        features[name], lengths[name] = x, torch.tensor(counts)
    return features, lengths


def utterance(generator, lengths):
    return {
        n: torch.randn(t, DIMS["text" if n == "text_sim" else n], generator=generator) for n, t in lengths.items() if t
    }


@pytest.mark.parametrize("imagination", ["both", "utterance", "content", "none"])
def test_equals_the_plain_network(imagination):
    model, w = imported(imagination)
    g = torch.Generator().manual_seed(1)
    u = utterance(g, {"audio": 7, "text": 4, "text_sim": 5, "video": 3})
    got = model(*batch_of([u], u))
    places = (imagination in ("both", "utterance"), imagination in ("both", "content"))
    for flow, text, imagine in ((COMPLETE, "text", (False, False)), (MISSING, "text_sim", places)):
        want = plain_forward(w, {"audio": u["audio"], "text": u[text], "video": u["video"]}, imagine)
        for name, value in want.items():
            torch.testing.assert_close(getattr(got[flow], name)[0].double(), value, rtol=1e-5, atol=1e-5)


def test_without_padding_masks_equals_the_released_network_on_equal_lengths():
    model, w = imported("none", mask_padding=False)
    g = torch.Generator().manual_seed(2)
    us = [utterance(g, {"audio": 6, "text": 4, "video": 5}) for _ in range(3)]
    got = model(*batch_of(us, DIMS), flows=(COMPLETE,))[COMPLETE].prediction
    want = torch.stack([plain_forward(w, u)["prediction"] for u in us])
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_without_padding_masks_padding_changes_a_prediction():
    model, _ = imported("none", mask_padding=False)
    g = torch.Generator().manual_seed(2)
    short, long = (utterance(g, dict.fromkeys(DIMS, t)) for t in (2, 30))
    alone = model(*batch_of([short], DIMS), flows=(COMPLETE,))[COMPLETE].prediction[0]
    beside = model(*batch_of([short, long], DIMS), flows=(COMPLETE,))[COMPLETE].prediction[0]
    assert abs(alone - beside) > 1e-3


NAMES = ("audio", "text", "text_sim", "video")
LENGTHS = st.fixed_dictionaries({n: st.integers(0, 9) for n in NAMES}).filter(lambda d: d["audio"] + d["video"] > 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(LENGTHS, min_size=1, max_size=6), st.integers(0, 2**31), st.randoms(use_true_random=False))
def test_a_prediction_does_not_depend_on_its_batch(lengths, seed, random):
    model, _ = imported()
    g = torch.Generator().manual_seed(seed)
    us = [utterance(g, x) for x in lengths]
    with torch.inference_mode():
        alone = [model(*batch_of([u], NAMES)) for u in us]
        order = list(range(len(us)))
        random.shuffle(order)
        together = model(*batch_of([us[i] for i in order], NAMES))
    for flow in (COMPLETE, MISSING):
        for place, i in enumerate(order):
            assert torch.isfinite(together[flow].prediction[place])
            torch.testing.assert_close(
                together[flow].prediction[place], alone[i][flow].prediction[0], rtol=1e-5, atol=1e-5
            )


def test_very_long_beside_one_frame():
    model, _ = imported()
    g = torch.Generator().manual_seed(3)
    us = [utterance(g, dict.fromkeys(NAMES, t)) for t in (1, 5000)]
    with torch.inference_mode():
        both = model(*batch_of(us, NAMES))[MISSING].prediction
        for i, u in enumerate(us):
            torch.testing.assert_close(
                model(*batch_of([u], NAMES))[MISSING].prediction[0], both[i], rtol=1e-5, atol=1e-5
            )


def test_one_flow_alone_equals_both_together():
    model, _ = imported()
    g = torch.Generator().manual_seed(4)
    us = [utterance(g, {"audio": 5, "text": 2, "text_sim": 7, "video": 3}) for _ in range(3)]
    both = model(*batch_of(us, NAMES))
    for flow, names in ((COMPLETE, ("audio", "text", "video")), (MISSING, ("audio", "text_sim", "video"))):
        one = model(*batch_of(us, names), flows=(flow,))[flow]
        torch.testing.assert_close(one.prediction, both[flow].prediction, rtol=1e-5, atol=1e-5)


SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(("audio", "text", "video"), n)]


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_absent_is_the_same_as_not_given_and_trains_without_nan(subset):
    model, _ = imported()
    model.train()
    g = torch.Generator().manual_seed(5)
    full = utterance(g, {"audio": 5, "text": 4, "video": 3})
    some = {m: full[m] for m in subset}
    model.eval()
    left_out = model(*batch_of([some], subset), flows=(COMPLETE,))[COMPLETE]
    zero_length = model(*batch_of([some, full], DIMS), flows=(COMPLETE,))[COMPLETE]
    torch.testing.assert_close(left_out.prediction[0], zero_length.prediction[0], rtol=1e-5, atol=1e-5)
    model.train()
    model(*batch_of([some, full], DIMS), flows=(COMPLETE,))[COMPLETE].prediction.sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_an_absent_modality_has_no_say_whatever_its_padding_holds():
    model, _ = imported()
    g = torch.Generator().manual_seed(6)
    u = utterance(g, {"audio": 5, "text": 4, "video": 3})
    features, lengths = batch_of([u], DIMS)
    lengths["video"] = torch.zeros_like(lengths["video"])
    before = model(features, lengths, flows=(COMPLETE,))[COMPLETE].prediction
    features["video"] = torch.randn_like(features["video"]) * 100
    after = model(features, lengths, flows=(COMPLETE,))[COMPLETE].prediction
    assert torch.equal(before, after)


def test_attention_is_returned_per_query_and_sums_to_one_over_true_frames():
    model, _ = imported()
    g = torch.Generator().manual_seed(7)
    us = [utterance(g, {"audio": t, "text": 4, "text_sim": 5, "video": 3}) for t in (2, 9)]
    out = model(*batch_of(us, NAMES), with_attention=True)
    a = out[MISSING].attention["audio"]
    assert a.shape == (2, 7, 9)
    torch.testing.assert_close(a.sum(-1), torch.ones(2, 7))
    assert a[0, :, 2:].abs().max() == 0


def test_a_corpus_without_video_needs_no_video():
    model = SDUMC(ModelConfig(audio_dim=4, text_dim=6, video_dim=0, dim=16, content_dim=8)).eval()
    x = {"audio": torch.randn(2, 3, 4), "text_sim": torch.randn(2, 5, 6)}
    n = {"audio": torch.tensor([3, 1]), "text_sim": torch.tensor([5, 0])}
    assert model(x, n, flows=(MISSING,))[MISSING].prediction.shape == (2,)
    with pytest.raises(ValueError, match="made without video"):
        model({"video": torch.randn(2, 3, 4)}, {"video": torch.tensor([3, 3])})


def test_concat_ablation():
    model = SDUMC(ModelConfig(4, 6, 5, dim=16, content_dim=8, fusion="concat")).eval()
    x = {"audio": torch.randn(2, 3, 4), "text": torch.randn(2, 5, 6), "video": torch.randn(2, 2, 5)}
    out = model(x, {k: torch.tensor([v.shape[1], 1]) for k, v in x.items()}, flows=(COMPLETE,))[COMPLETE]
    assert out.prediction.shape == (2,) and out.text_query is None


def test_pooled_statistics_are_of_true_frames_only():
    torch.manual_seed(0)
    model = SDUMC(ModelConfig(**{f"{m}_dim": d for m, d in DIMS.items()}, dim=16, content_dim=8, pooling="statistics"))
    model.eval()
    g = torch.Generator().manual_seed(1)
    short, long = (utterance(g, dict.fromkeys(("audio", "text", "text_sim", "video"), t)) for t in (1, 9))
    alone, beside = model(*batch_of([short], short)), model(*batch_of([short, long], short))
    torch.testing.assert_close(alone[MISSING].prediction[0], beside[MISSING].prediction[0], rtol=1e-5, atol=1e-5)
    h = torch.tensor([[[1.0], [3.0], [50.0]]])
    found = layers.mean_and_deviation(h, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(found, torch.tensor([[2.0, 1.0]]), rtol=1e-4, atol=1e-4)
    assert layers.mean_and_deviation(h, torch.zeros(1, 3, dtype=torch.bool))[0, 0] == 0


def test_predictions_stay_in_range():
    g = torch.Generator().manual_seed(1)
    u = utterance(g, {"audio": 3, "text": 2, "video": 4})
    found = {}
    for limit in (0.0, 3.5):
        torch.manual_seed(0)
        model = SDUMC(
            ModelConfig(**{f"{m}_dim": d for m, d in DIMS.items()}, dim=16, content_dim=8, output_range=limit)
        )
        model.output.weight.data *= 500
        found[limit] = model.eval()(*batch_of([u], u))[COMPLETE].prediction
    assert found[0.0].abs() > 3.5 >= found[3.5].abs() and found[0.0].sign() == found[3.5].sign()


def test_parameters_at_the_released_dimensions():
    model = SDUMC(ModelConfig(audio_dim=1024, text_dim=4096, video_dim=1024))
    dead = (128 + 1) + (1 + 1) + 6 + 2 * 256
    assert sum(p.numel() for p in model.parameters()) + dead == 4_268_884
    mia = [p for n, p in model.named_parameters() if n.startswith("imagine")]
    assert sum(p.numel() for p in mia) == 410_944


def test_wrong_shapes_are_named():
    model, _ = imported()
    with pytest.raises(ValueError, match=r"audio: expected \(B, T, 12\)"):
        model({"audio": torch.randn(1, 2, 11)}, {"audio": torch.tensor([2])})


def attention_inputs(seed=0, size=5, frames=7, dim=8, queries=3, dtype=torch.float64):
    torch.manual_seed(seed)
    h = torch.randn(size, frames, dim, dtype=dtype, requires_grad=True)
    q = torch.randn(size, queries, dim, dtype=dtype, requires_grad=True)
    mask = torch.arange(frames) < torch.tensor([7, 1, 0, 4, 6])[:size].unsqueeze(1)
    return h, mask, q, torch.nn.Linear(dim, dim).to(dtype)


@pytest.mark.parametrize("block", [1, 100, 2**20])
def test_blocked_attention_is_the_plain_one_forward_and_backward(block, monkeypatch):
    monkeypatch.setattr(layers, "_BLOCK", block)
    h, mask, q, key = attention_inputs()
    target = torch.randn(5, 3, 8, dtype=torch.float64)
    results = []
    for compiling in (True, False):  # what runs while compiling is the plain way
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda c=compiling: c)
        values, weights = layers.attend(h, mask, q, key, 0.3, 0.0)
        grads = torch.autograd.grad((values * target).sum(), [h, q, key.weight, key.bias])
        results.append([values, weights, *grads])
    for plain, blocked in zip(*results, strict=True):
        torch.testing.assert_close(blocked, plain)


def test_gradient_of_blocked_attention_under_dropout(monkeypatch):
    h, mask, q, key = attention_inputs(size=3)

    def values(h, q, weight, bias):
        torch.manual_seed(1)  # the same frames dropped at every call
        return layers._BlockedAttention.apply(h, mask, q, weight, bias, 0.3, 128)[0]

    inputs = (h, q, key.weight.detach().requires_grad_(), key.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(values, inputs)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 1.0])
def test_blocked_dropout_keeps_the_mean_and_the_rate(rate):
    h = torch.ones(40, 30, 50)
    noise = layers._random_bytes(h.shape)
    dropped, factor = layers._drop(h, noise, round(256 * rate), slice(0, 40))
    assert dropped.eq(0).float().mean().item() == pytest.approx(rate, abs=0.01)
    if rate < 1:
        assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(factor, dropped)


def test_compiled_it_says_and_learns_the_same():
    # aot_eager traces forward and backward as the default backend does, without minutes of C++ compilation.
    torch.manual_seed(0)
    model = SDUMC(ModelConfig(DIMS["audio"], DIMS["text"], DIMS["video"], dim=16, content_dim=8)).eval()
    compiled = torch.compile(model, dynamic=True, backend="aot_eager")
    utterances = [{n: torch.randn(3 + i, d) for n, d in [*DIMS.items(), ("text_sim", DIMS["text"])]} for i in range(4)]
    inputs = batch_of(utterances, ["audio", "text", "text_sim", "video"])
    gradients = []
    for network in (model, compiled):
        model.zero_grad()
        out = network(*inputs)
        sum(flow.prediction.square().sum() for flow in out.values()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    # What the loss does not reach has no gradient in one, and zeros in the other.
    assert gradients[0].keys() <= gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)
