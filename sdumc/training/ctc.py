"""The projector's warm start: CTC over the LLM's tokens, scored by products with the LLM's own input embeddings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sdumc.extraction.loop import read_ahead
from sdumc.pretrained.speech import Projector, project_all
from sdumc.training.data import TranscribedSpeech, spread

_SHARPNESS = 40.0  # of the scores at first, where a frame equals a token's embedding; learned
_NEAR, _TOLD = 0.5, 0.3  # weights of the other parts of the loss
_STATISTICS_UTTERANCES = 300
_STATISTICS_SECONDS = 400.0  # of sound in a batch, padded


class TokenScores(nn.Module):
    """How like projected frames are to the LLM's own input embeddings of some tokens, and to a blank that is learned.

    The frames are read with zero mean and unit deviation in each dimension; :meth:`fold` gives that to the projector.
    """

    tokens: Tensor
    embeddings: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, tokens: Sequence[int], embeddings: Tensor, encoder_dim: int):
        super().__init__()
        self.size = float(embeddings.norm(dim=1).mean())
        self.register_buffer("tokens", torch.tensor(list(tokens)))
        self.register_buffer("embeddings", embeddings / self.size, persistent=False)
        self.register_buffer("mean", torch.zeros(encoder_dim))
        self.register_buffer("deviation", torch.ones(encoder_dim))
        self.blank = nn.Parameter(torch.randn(1, embeddings.shape[1]) / math.sqrt(embeddings.shape[1]))
        self.bias = nn.Parameter(torch.zeros(1 + len(tokens)))
        self.sharpness = nn.Parameter(torch.tensor(math.log(_SHARPNESS)))

    def loss(
        self, projector: Projector, frames: Sequence[Tensor], answers: Sequence[Sequence[int]], others: Sequence[int]
    ) -> tuple[Tensor, int]:
        """What the warm start learns from, summed over the tokens of a batch, and their number. It has three parts: CTC
        of the answers; how far frames that are no blanks are from the embeddings that they are taken for; and how well
        the projector tells blanks from them.

        Args:
            answers: positions in ``tokens``. others: those of the tokens that the answers' compete with.
        """
        columns = sorted({*others, *(i for a in answers for i in a)})
        place = {column: i for i, column in enumerate(columns, start=1)}
        projected = project_all(projector, self.normalised(frames))
        rows = torch.cat(projected)
        embeddings = self.embeddings[columns]
        scores = self.scores(rows, embeddings, self.bias[[0, *(c + 1 for c in columns)]])
        loss, tokens = ctc_loss(scores.split([len(x) for x in projected]), [[place[i] for i in a] for a in answers])
        found = scores.detach().exp()
        blank = (found.argmax(1) == 0).float()
        weight = 1 - blank[:, None]
        expected = found[:, 1:] @ embeddings / found[:, 1:].sum(1, keepdim=True).clamp_min(1e-6)
        distance = (weight * (rows / self.size - expected).square()).sum() / weight.sum().clamp_min(1)
        assert projector.blank is not None
        told = nn.functional.binary_cross_entropy_with_logits(projector.blank(rows)[:, 0], blank)
        return loss + tokens * (_NEAR * distance + _TOLD * told), tokens

    def normalised(self, frames: Sequence[Tensor]) -> list[Tensor]:
        return [(x.to(self.mean) - self.mean) / self.deviation for x in frames]

    def scores(self, rows: Tensor, embeddings: Tensor, bias: Tensor) -> Tensor:
        """Projected frames (N, D) -> log-probabilities (N, 1 + tokens), the blank first."""
        similar = (rows / self.size) @ torch.cat([self.blank, embeddings]).T
        return (similar * self.sharpness.exp() + bias).log_softmax(-1)

    @torch.no_grad()
    def best(self, projector: Projector, frames: Sequence[Tensor]) -> list[list[int]]:
        """The tokens of the best path through each clip."""
        paths = [
            self.scores(x, self.embeddings, self.bias).argmax(-1)
            for x in project_all(projector, self.normalised(frames))
        ]
        return [[int(self.tokens[i - 1]) for i in torch.unique_consecutive(path) if i] for path in paths]

    def measure(self, train: TranscribedSpeech) -> None:
        """Mean and deviation of the frames, of some hundred utterances."""
        batches = read_ahead(
            train.batches(spread(train.utterances, _STATISTICS_UTTERANCES), _STATISTICS_SECONDS), train.read
        )
        frames = torch.cat([x.float() for batch, waves in batches for x in train.frames(batch, waves)])
        self.mean.copy_(frames.mean(0))
        self.deviation.copy_(frames.std(0).clamp_min(1e-6))

    @torch.no_grad()
    def fold(self, projector: Projector) -> None:
        """Let the projector do what was done with the frames before it."""
        first, k = projector.linear1, projector.k
        first.weight.div_(self.deviation.repeat(k))
        first.bias.sub_(first.weight @ self.mean.repeat(k))


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
