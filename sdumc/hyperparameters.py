"""What fixes the network and its objective. No torch here: the command line reads its defaults."""

from __future__ import annotations

from dataclasses import dataclass

IMAGINATION = ("both", "utterance", "content", "none")
FUSION = ("umca", "concat")
POOLING = ("attention", "statistics")


@dataclass(frozen=True)
class ModelConfig:
    """Settings of :class:`sdumc.model.network.SDUMC`.

    Attributes:
        audio_dim, text_dim, video_dim: features per frame; 0 where the corpus has no such modality at all.
        dim: width d of everything before the content.
        content_dim: width e of the attended content.
        dropout: in the perceptrons.
        attention_dropout: around both attentions.
        scale: the factor s on attention scores.
        imagination: where MIA acts: ``both`` places, only on the pooled ``utterance`` vectors, only on the attended
            ``content``, or ``none``.
        fusion: ``umca``, or ``concat`` for the ablation that feeds the pooled vectors straight to a perceptron.
        missing_text: what the missing flow has learned to read for text (:data:`sdumc.conditions.MISSING_TEXTS`);
            changes nothing in the network, but a trained one must be given the same.
        pooling: ``attention`` over a modality's frames, or ``statistics``: mean and deviation beside it, which is not
            in the paper.
        output_range: predictions are kept within +-X by X tanh(x / X); 0: not limited, as in the paper.
        mask_padding: False reproduces the released network, whose attention also spreads over padded frames.
    """

    audio_dim: int
    text_dim: int
    video_dim: int
    dim: int = 256
    content_dim: int = 128
    dropout: float = 0.3
    attention_dropout: float = 0.5
    scale: float = 0.3
    imagination: str = "both"
    fusion: str = "umca"
    pooling: str = "attention"
    output_range: float = 0.0
    mask_padding: bool = True
    missing_text: str = "simulated"

    def __post_init__(self) -> None:
        if self.imagination not in IMAGINATION:
            raise ValueError(f"imagination must be one of {', '.join(IMAGINATION)}, not {self.imagination!r}")
        if self.fusion not in FUSION:
            raise ValueError(f"fusion must be one of {', '.join(FUSION)}, not {self.fusion!r}")
        if self.pooling not in POOLING:
            raise ValueError(f"pooling must be one of {', '.join(POOLING)}, not {self.pooling!r}")


@dataclass(frozen=True)
class ObjectiveWeights:
    """The factor of each term; 0 leaves a term out. The defaults are the released system's.

    ``temperature`` is Rank-N-Contrast's.
    """

    mse_complete: float = 0.5
    mse_missing: float = 0.5
    distil_query: float = 0.1
    distil_content: float = 0.7
    similarity: float = 0.13
    contrast: float = 0.5
    temperature: float = 2.0
