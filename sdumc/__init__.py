"""SDUMC: multimodal sentiment analysis that works with the transcript and without it.

>>> from sdumc import Scorer
>>> scorer = Scorer.load("exp/train_seed1")
>>> scorer.score("clip.mp4").overall
"""

import os

__version__ = "0.1.0"
__all__ = ["Scorer", "__version__"]

# How OpenMP's threads wait for each other, unless the user says. By default they spin for milliseconds, which makes
# training up to 40 times slower beside one other busy process; see docs/benchmarks.md. Here they sleep soon: after
# 2000 checks (GNU's runtime, some 20 to 100 microseconds) or at once (others).
# The runtime reads these variables when it is loaded, with torch. So they are set here: every command, every process
# of a launcher and `from sdumc import Scorer` import this module before torch.
WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
WAITING_NAMES = (*WAITING, "KMP_BLOCKTIME")
if not any(name in os.environ for name in WAITING_NAMES):
    os.environ.update(WAITING)


def __getattr__(name: str):
    """Load :class:`sdumc.prediction.scorer.Scorer` when it is asked for: it needs torch, which most imports do not."""
    if name == "Scorer":
        from sdumc.prediction.scorer import Scorer

        return Scorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
