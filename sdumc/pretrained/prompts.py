"""The instruction between sound and answer in the LLM's input."""

from __future__ import annotations

PROMPTS = {
    "short": "Transcribe speech to text. ",
    "long": (
        "Transcribe speech to text. Output the transcription directly without redundant content. "
        "Ensure that the output is not duplicated. "
    ),
}


def prompt_text(value: str) -> str:
    """The text of ``--prompt``."""
    return PROMPTS.get(value, value)
