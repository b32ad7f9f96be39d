"""SDUMC: multimodal sentiment analysis that works with the transcript and nearly as well without it."""

__version__ = "0.1.0"
