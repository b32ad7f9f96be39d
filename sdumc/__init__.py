"""SDUMC: multimodal sentiment analysis that works with the transcript and nearly as well without it.

>>> from sdumc import Scorer
>>> scorer = Scorer.load("exp/train_seed1")
>>> scorer.score("clip.mp4").overall
"""

import os

__version__ = "0.1.0"
__all__ = ["Scorer", "__version__"]

# How OpenMP's threads wait for each other; see docs/benchmarks.md. Unless the user says, they sleep: spinning, the
# default, makes training up to 40 times slower beside one other busy process. The runtime reads its variables when it
# is loaded, with torch, so this stands where every command and every process of a launcher comes by first.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
if not any(name in os.environ for name in WAITING):
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def __getattr__(name: str):
    """Load :class:`sdumc.prediction.scorer.Scorer` when it is asked for: it needs torch, which most imports do not."""
    if name == "Scorer":
        from sdumc.prediction.scorer import Scorer

        return Scorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
