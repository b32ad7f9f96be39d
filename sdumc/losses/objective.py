"""The SDUMC objective: regression in both flows, self-distillation, representation similarity, Rank-N-Contrast."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sdumc.losses.contrast import rank_n_contrast
from sdumc.losses.weights import ObjectiveWeights


def mean_squared_error(prediction: Tensor, label: Tensor) -> Tensor:
    """(B,), (B,) -> mean of (prediction - label)^2; 0 for an empty batch."""
    return (prediction - label).square().sum() / max(label.numel(), 1)


def root_mean_squared_error(a: Tensor, b: Tensor) -> Tensor:
    """sqrt of the mean squared difference over the whole tensors (B, ...); 0, with zero gradient, where they are equal.

    The slope of the square root is infinite at 0, and would make the gradient NaN.
    """
    mean_square = (a - b).square().sum() / max(a.numel(), 1)
    positive = mean_square > 0
    return torch.where(positive, torch.where(positive, mean_square, 1.0).sqrt(), 0.0)


def sdumc_objective(
    complete: Mapping[str, Tensor] | None,
    missing: Mapping[str, Tensor] | None,
    labels: Tensor,
    has_text: Tensor,
    weights: ObjectiveWeights,
) -> dict[str, Tensor]:
    """All terms of the objective and their weighted sum.

    Args:
        complete, missing: per flow the tensors ``prediction`` (B,), ``utterance`` (B, e), ``contrast`` (B, D) and,
            with UMCA, ``text_query`` (B, d) and ``text_content`` (B, 7, e). None if only the other flow is trained:
            the terms that need both are then left out.
        labels: (B,) sentiment.
        has_text: (B,) True where the complete flow saw real text; its terms use these utterances only.
        weights: factor of each term.

    Returns:
        ``loss`` and each term that takes part, unweighted, as scalars.
    """
    terms: dict[str, Tensor] = {}
    if complete is not None:
        terms["mse_complete"] = mean_squared_error(complete["prediction"][has_text], labels[has_text])
    if missing is not None:
        terms["mse_missing"] = mean_squared_error(missing["prediction"], labels)
    if complete is not None and missing is not None:
        pupil = {name: x[has_text] for name, x in missing.items()}
        teacher = {name: x[has_text] for name, x in complete.items()}
        for term, name in (("distil_query", "text_query"), ("distil_content", "text_content")):
            if name in teacher:
                terms[term] = root_mean_squared_error(pupil[name], teacher[name].detach())
        terms["similarity"] = root_mean_squared_error(pupil["utterance"], teacher["utterance"])
    views = [(flow["contrast"], labels) for flow in (missing,) if flow is not None]
    if complete is not None:
        views.insert(0, (complete["contrast"][has_text], labels[has_text]))
    features, targets = torch.cat([v for v, _ in views]), torch.cat([y for _, y in views])
    if weights.contrast and len(targets) >= 2:
        terms["contrast"] = rank_n_contrast(features.float(), targets, weights.temperature)
    terms = {name: term for name, term in terms.items() if getattr(weights, name)}
    if not terms:
        raise ValueError("every term of the objective has weight 0")
    terms["loss"] = sum(getattr(weights, name) * term for name, term in terms.items())
    return terms
