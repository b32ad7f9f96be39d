"""Each term of the objective against its formula in float64, and Rank-N-Contrast at its edges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdumc.hyperparameters import ObjectiveWeights
from sdumc.losses.objective import (
    LABEL_TOLERANCE,
    mean_squared_error,
    rank_n_contrast,
    root_mean_squared_error,
    sdumc_objective,
)


def by_definition(features, labels, temperature=2.0):
    x, y, n = features.double(), labels.double(), len(features)
    total = 0.0
    for i in range(n):
        s = {k: -torch.linalg.vector_norm(x[i] - x[k]) / temperature for k in range(n) if k != i}
        for j in s:
            d = abs(y[i] - y[j])
            farther = torch.stack([s[k] for k in s if abs(y[i] - y[k]) >= d - LABEL_TOLERANCE])
            total = total - (s[j] - torch.logsumexp(farther, 0))
    return total / (n * (n - 1))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e3, 1e6])
@pytest.mark.parametrize("seed", [0, 1])
def test_rank_n_contrast_equals_its_definition(scale, seed):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(13, 4, generator=g, dtype=torch.float64) * scale).requires_grad_()
    y = torch.randint(-9, 10, (13,), generator=g).float() / 3
    got, want = rank_n_contrast(x, y), by_definition(x, y)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    a, b = torch.autograd.grad(got, x)[0], torch.autograd.grad(want, x)[0]
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_thirds_count_as_ties():
    # 1 - 2/3 and 1/3 - 0 differ in the last bit of float32; without the tolerance the value is another.
    y = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7]).float() / 3
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    exact = rank_n_contrast(x, torch.arange(8).float())  # the same order without rounding
    torch.testing.assert_close(rank_n_contrast(x, y), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_rank_n_contrast_gradient(seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 3, generator=g, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 4, (7,), generator=g) / 3
    assert torch.autograd.gradcheck(lambda x: rank_n_contrast(x, y), (x,))
    far = (x.detach() * 1e4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rank_n_contrast(x, y), (far,), eps=1e-2, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 12),
    st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e3, 1e6, 1e15]),
    st.booleans(),
    st.integers(1, 4),
    st.integers(0, 10**6),
)
def test_rank_n_contrast_is_finite(n, scale, coincident, distinct_labels, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 5, generator=g) * scale
    if coincident:
        x[: n // 2] = x[0]
    x.requires_grad_()
    y = torch.randint(0, distinct_labels, (n,), generator=g) / 3
    loss = rank_n_contrast(x, y)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(x.grad).all()


def test_two_samples_cost_nothing():
    assert rank_n_contrast(torch.tensor([[0.0], [5.0]]), torch.tensor([1.0, -1.0])) == 0


def test_one_sample_is_refused():
    with pytest.raises(ValueError, match="n >= 2"):
        rank_n_contrast(torch.zeros(1, 3), torch.zeros(1))


def test_errors_against_formulas():
    a, b = torch.randn(6, 7, 4, dtype=torch.float64), torch.randn(6, 7, 4, dtype=torch.float64)
    torch.testing.assert_close(root_mean_squared_error(a, b), ((a - b) ** 2).mean().sqrt())
    torch.testing.assert_close(mean_squared_error(a[:, 0, 0], b[:, 0, 0]), ((a[:, 0, 0] - b[:, 0, 0]) ** 2).mean())


def test_root_mean_squared_error_of_equal_tensors_has_a_zero_gradient():
    a = torch.randn(3, 4, requires_grad=True)
    loss = root_mean_squared_error(a, a.detach().clone())
    loss.backward()
    assert loss == 0 and a.grad.abs().max() == 0


def flow(g, b):
    shapes = {"prediction": (b,), "utterance": (b, 8), "contrast": (b, 64), "text_query": (b, 16)}
    shapes["text_content"] = (b, 7, 8)
    return {
        n: torch.randn(s, generator=g, dtype=torch.float64).float().double().requires_grad_() for n, s in shapes.items()
    }


def test_the_objective_is_the_weighted_sum_and_the_teacher_is_not_taught():
    g = torch.Generator().manual_seed(0)
    full, miss = flow(g, 5), flow(g, 5)
    y = torch.tensor([-1.0, 0.0, 1 / 3, 2.0, 3.0], dtype=torch.float64)
    everyone = torch.ones(5, dtype=torch.bool)
    got = sdumc_objective(full, miss, y, everyone, ObjectiveWeights())["loss"]

    def rmse(name):
        return ((full[name] - miss[name]) ** 2).mean().sqrt()

    views = torch.cat([full["contrast"], miss["contrast"]]).float()
    want = (
        0.5 * ((full["prediction"] - y) ** 2).mean()
        + 0.5 * ((miss["prediction"] - y) ** 2).mean()
        + 0.1 * rmse("text_query")
        + 0.7 * rmse("text_content")
        + 0.13 * rmse("utterance")
        + 0.5 * by_definition(views, torch.cat([y, y]).float())
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    got.backward()
    assert full["text_query"].grad is None and full["text_content"].grad is None
    assert miss["text_query"].grad.abs().sum() > 0 and full["utterance"].grad.abs().sum() > 0


def test_only_utterances_with_real_text_teach():
    g = torch.Generator().manual_seed(0)
    full, miss = flow(g, 4), flow(g, 4)
    y, some = torch.zeros(4, dtype=torch.float64), torch.tensor([True, False, True, False])
    got = sdumc_objective(full, miss, y, some, ObjectiveWeights(contrast=0))
    kept_f, kept_m = ({n: x[some] for n, x in f.items()} for f in (full, miss))
    want = sdumc_objective(kept_f, kept_m, y[some], some[some], ObjectiveWeights(contrast=0))
    for name in ("mse_complete", "distil_query", "distil_content", "similarity"):
        torch.testing.assert_close(got[name], want[name])
    torch.testing.assert_close(got["mse_missing"], mean_squared_error(miss["prediction"], y))
    none = sdumc_objective(full, miss, y, torch.zeros(4, dtype=torch.bool), ObjectiveWeights())
    assert torch.isfinite(none["loss"])


def test_terms_of_weight_zero_are_left_out():
    g = torch.Generator().manual_seed(0)
    terms = sdumc_objective(
        flow(g, 3), None, torch.zeros(3), torch.ones(3, dtype=torch.bool), ObjectiveWeights(contrast=0)
    )
    assert set(terms) == {"mse_complete", "loss"}
