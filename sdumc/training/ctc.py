"""The projector's warm start: CTC over the tokens of its vocabulary, without the LLM's layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sdumc.extraction.loop import read_ahead
from sdumc.pretrained.projector import Projector, positions
from sdumc.training.data import TranscribedSpeech, spread

_NEAR = 0.5  # weight of the distance from embeddings
_STATISTICS_UTTERANCES = 300
_STATISTICS_SECONDS = 400.0  # of sound in a batch, padded


class Normaliser(nn.Module):
    """Frames with zero mean and unit deviation in each dimension, until :meth:`fold` gives that to the projector."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("deviation", torch.ones(dim))

    def forward(self, frames: Sequence[Tensor]) -> list[Tensor]:
        return [(x.to(self.mean) - self.mean) / self.deviation for x in frames]

    def measure(self, train: TranscribedSpeech) -> None:
        """Take mean and deviation from some hundred utterances."""
        chosen = spread(train.utterances, _STATISTICS_UTTERANCES)
        batches = read_ahead(train.batches(chosen, _STATISTICS_SECONDS), train.read)
        frames = torch.cat([x.float() for batch, waves in batches for x in train.frames(batch, waves)])
        self.mean.copy_(frames.mean(0))
        self.deviation.copy_(frames.std(0).clamp_min(1e-6))

    @torch.no_grad()
    def fold(self, projector: Projector) -> None:
        """Let the projector's first layer do this from now on."""
        first, k = projector.linear1, projector.k
        first.weight.div_(self.deviation.repeat(k))
        first.bias.sub_(first.weight @ self.mean.repeat(k))


def warm_loss(
    projector: Projector, frames: Sequence[Tensor], answers: Sequence[Sequence[int]], others: Sequence[int]
) -> tuple[Tensor, int]:
    """What the warm start learns from, summed over the tokens of a batch, and their number: CTC of the answers, and how
    far positions that are no blanks are from the embeddings that they are taken for.

    Args:
        answers: numbers of tokens in the vocabulary. others: those of the tokens that the answers' compete with.
    """
    vocabulary = projector.vocabulary
    assert vocabulary is not None
    tokens = sorted({*others, *(i for a in answers for i in a)})
    column = {token: i for i, token in enumerate(tokens, start=1)}
    output = positions(projector, frames)
    rows = torch.cat(output)
    scores = vocabulary.scores(rows, tokens)
    loss, count = ctc_loss(scores.split([len(x) for x in output]), [[column[i] for i in a] for a in answers])
    found = scores.detach().exp()
    spoken = (found.argmax(1) != 0).float()
    expected = found[:, 1:] @ vocabulary.embeddings[tokens] / found[:, 1:].sum(1, keepdim=True).clamp_min(1e-6)
    distance = (((rows - expected) / vocabulary.size).square().sum(1) * spoken).sum() / spoken.sum().clamp_min(1)
    return loss + _NEAR * count * distance, count


def ctc_loss(scores: Sequence[Tensor], answers: Sequence[Sequence[int]]) -> tuple[Tensor, int]:
    """Summed CTC loss of ``answers`` (column numbers of ``scores``; 0 is the blank), and their number of tokens.

    A clip with fewer positions than its transcript needs is left out.
    """
    fits = [i for i, (x, a) in enumerate(zip(scores, answers, strict=True)) if a and len(x) >= positions_needed(a)]
    if not fits:
        return torch.cat(list(scores)).sum() * 0.0, 0
    chosen, targets = [scores[i] for i in fits], [answers[i] for i in fits]
    loss = nn.functional.ctc_loss(
        nn.utils.rnn.pad_sequence(chosen),
        torch.tensor([i for a in targets for i in a], device=chosen[0].device),
        torch.tensor([len(x) for x in chosen]),
        torch.tensor([len(a) for a in targets]),
        reduction="sum",
    )
    return loss, sum(map(len, targets))


def positions_needed(answer: Sequence[int]) -> int:
    """How many positions CTC needs for an answer: one a token, and a blank between two of the same."""
    return len(answer) + sum(a == b for a, b in itertools.pairwise(answer))
