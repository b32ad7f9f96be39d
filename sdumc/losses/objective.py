"""The SDUMC objective: regression in both flows, self-distillation, representation similarity, Rank-N-Contrast.

Rank-N-Contrast (Zha et al., NeurIPS 2023) takes O(n^2 log n) time and O(n^2) memory here.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sdumc.hyperparameters import ObjectiveWeights

# With labels in thirds, distances that are mathematically equal differ in the last bit.
LABEL_TOLERANCE = 1e-4
# exp() over a wider range than this underflows in float64; the sums are then computed as logarithms.
_WIDEST_RANGE = 600.0


def rank_n_contrast(features: Tensor, labels: Tensor, temperature: float = 2.0) -> Tensor:
    """Mean over anchors i and others j of -log( exp(s_ij/t) / sum over k != i with d_ik >= d_ij of exp(s_ik/t) ).

    s is the negative L2 distance of features, d the L1 distance of labels; distances within 1e-4 count as equal.

    Samples are sorted by label. Those that are at least as far from anchor i as j is are then a prefix and a suffix of
    the order, the same ones for every j of the same label. So cumulative sums over groups of equal labels, from either
    end, give every denominator, and no tensor of size (n, n, n) or (n, n, D) is needed.

    Args:
        features: (n, D), n >= 2, finite.
        labels: (n,), finite.
        temperature: t > 0.

    Returns:
        A scalar, finite and with finite gradient, of the dtype of ``features``.

    Raises:
        ValueError: fewer than two samples, or sizes that differ.
    """
    n = features.shape[0]
    if features.dim() != 2 or labels.shape != (n,) or n < 2:
        raise ValueError(f"expected (n, D) features and (n,) labels, n >= 2; got {features.shape} and {labels.shape}")
    # float64 keeps small terms next to large ones.
    x = features.double()
    order = torch.argsort(labels, stable=True)
    y = labels.detach().double()[order]
    logits = -_distances(x[order]) / temperature  # (n, n)

    groups, group_of, group_size = torch.unique_consecutive(y, return_inverse=True, return_counts=True)
    farther_below, farther_above, everyone = _farther_groups(groups)

    itself = torch.eye(n, dtype=torch.bool, device=x.device)
    others = logits.masked_fill(itself, float("-inf"))
    highest = others.detach().amax(dim=1, keepdim=True)
    lowest = logits.detach().amin(dim=1, keepdim=True)  # the diagonal is 0, which no logit exceeds
    if bool(((highest - lowest) < _WIDEST_RANGE).all()):
        mass = torch.exp(others - highest)  # exactly 0 on the diagonal
        per_group = mass.new_zeros(n, len(groups)).index_add(1, group_of, mass)
        below = _pad_left(per_group.cumsum(1), 0.0)  # (n, u + 1): below[:, g] sums the groups before g
        above = _pad_right(per_group.flip(1).cumsum(1).flip(1), 0.0)  # above[:, g] sums the groups from g on
        pick_below, pick_above = farther_below[group_of], farther_above[group_of]
        total = below[:, -1:].expand(-1, len(groups))
        sums = torch.where(everyone[group_of], total, below.gather(1, pick_below) + above.gather(1, pick_above))
        # The sum of a group that holds only the anchor itself may be 0; its count below is 0, so it is not used.
        used = sums > 0
        log_denominator = torch.where(used, torch.log(torch.where(used, sums, 1.0)) + highest, 0.0)
    else:
        log_denominator = _log_denominator_wide(
            others, group_size, farther_below[group_of], farther_above[group_of], everyone[group_of]
        )

    # How many j != i of each group anchor i is compared with.
    count = group_size.expand(n, -1) - torch.nn.functional.one_hot(group_of, len(groups))
    loss = (count * log_denominator).sum() - logits.sum()  # the diagonal adds nothing
    return (loss / (n * (n - 1))).to(features.dtype)


def _farther_groups(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For anchor group a and compared group b (u, u): groups[:below] and groups[above:] are not nearer to a than b is.

    ``everyone`` is True where the two labels are equal within the tolerance: then all groups are at least as far.
    """
    radius = (groups.unsqueeze(1) - groups.unsqueeze(0)).abs() - LABEL_TOLERANCE
    low, high = groups.unsqueeze(1) - radius, groups.unsqueeze(1) + radius
    below = torch.searchsorted(groups, low.contiguous(), right=True)
    above = torch.searchsorted(groups, high.contiguous(), right=False)
    return below, above, radius <= 0


def _log_denominator_wide(others: Tensor, group_size: Tensor, below: Tensor, above: Tensor, everyone: Tensor) -> Tensor:
    """The same denominators from cumulative logsumexp, for features so far apart that exp() would underflow."""
    floor = torch.finfo(others.dtype).min / 4  # stands for -inf, whose gradient would be NaN
    finite = others.clamp_min(floor)
    from_left = _pad_left(torch.logcumsumexp(finite, dim=1), floor)
    from_right = _pad_right(torch.logcumsumexp(finite.flip(1), dim=1).flip(1), floor)
    first = _pad_left(group_size.cumsum(0).unsqueeze(0), 0).squeeze(0)  # first sample of each group; then n
    left = from_left.gather(1, first[below])
    right = from_right.gather(1, first[above])
    return torch.where(everyone, from_left[:, -1:], torch.logaddexp(left, right))


def _distances(x: Tensor) -> Tensor:
    """(n, D) -> (n, n) L2 distances with a zero gradient between points that coincide.

    A matrix product is avoided: its cancellation would give coincident points a small random distance.
    """
    # d_ij and d_ji are the same, so the gradient of both is passed through one side only, which halves the cost. The
    # second addend is 0.
    one_side = torch.cdist(x, x.detach(), compute_mode="donot_use_mm_for_euclid_dist")
    return one_side + (one_side.t() - one_side.detach())


def _pad_left(x: Tensor, value: float) -> Tensor:
    return torch.nn.functional.pad(x, (1, 0), value=value)


def _pad_right(x: Tensor, value: float) -> Tensor:
    return torch.nn.functional.pad(x, (0, 1), value=value)


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
