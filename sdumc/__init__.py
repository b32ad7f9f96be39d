"""SDUMC: multimodal sentiment analysis that works with the transcript and nearly as well without it.

>>> from sdumc import Scorer
>>> scorer = Scorer.load("exp/train_seed1")
>>> scorer.score("clip.mp4").overall
"""

__version__ = "0.1.0"
__all__ = ["Scorer", "__version__"]


def __getattr__(name: str):
    """Load :class:`sdumc.prediction.scorer.Scorer` when it is asked for: it needs torch, which most imports do not."""
    if name == "Scorer":
        from sdumc.prediction.scorer import Scorer

        return Scorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
