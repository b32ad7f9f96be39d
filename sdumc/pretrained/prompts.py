"""What stands before the answer in the LLM's input: the instruction, and the template around it."""

from __future__ import annotations

from typing import Any

from sdumc.errors import UserError

PROMPTS = {
    "short": "Transcribe speech to text. ",
    "long": (
        "Transcribe speech to text. Output the transcription directly without redundant content. "
        "Ensure that the output is not duplicated. "
    ),
}

PROMPT, SOUND, BOS = "{prompt}", "{sound}", "{bos}"
RELEASED = "released"
RELEASED_TEXT = SOUND + BOS + "USER: {prompt}\n ASSISTANT:"

# Some templates state the date; the LLM's input must be the same every day.
_FIXED_DATE = "{%- macro strftime_now(form) -%}26 Jul 2024{%- endmacro -%}"


def prompt_text(value: str) -> str:
    """The text of ``--prompt``."""
    return PROMPTS.get(value, value)


def resolve_template(value: str, prompt: str, tokenizer: Any, name: str) -> str:
    """``--prompt-template`` as it is recorded: ``released``, or a text with ``{prompt}`` and ``{sound}`` in it.

    Args:
        value: ``released``; ``chat``, the tokenizer's own chat template; ``auto``, that or else ``released``; or a text
            with ``{prompt}``. ``{sound}`` and ``{bos}`` in it say where the sound and the BOS token stand; without
            them, both stand before the text.

    Raises:
        UserError: the template drops the prompt or has it or the sound twice, or the tokenizer has no chat template.
    """
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if value == RELEASED or (value == "auto" and not has_chat):
        return RELEASED
    if value in ("chat", "auto"):
        if not has_chat:
            raise UserError(f"{name}: its tokenizer has no chat template; use --prompt-template released, or a text")
        return _chat_template(prompt, tokenizer, name)
    if value.count(PROMPT) != 1 or value.count(SOUND) > 1:
        raise UserError(
            f"--prompt-template {value!r}: must be released, chat, auto, or a text with {PROMPT} once (and {SOUND} at "
            "most once) in it"
        )
    return value


def _chat_template(prompt: str, tokenizer: Any, name: str) -> str:
    """A tokenizer's chat template with one user turn, in which the sound stands before the prompt."""
    asked = prompt.strip()  # many templates strip a turn
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
            chat_template=_FIXED_DATE + tokenizer.get_chat_template(),
        )
    except Exception as e:  # whatever a template of others raises
        raise UserError(
            f"{name}: its chat template cannot be used: {str(e).splitlines()[0] if str(e) else e!r}"
        ) from None
    before, found, after = text.rpartition(asked)
    if not asked or not found:
        raise UserError(
            f"{name}: its chat template drops the prompt {prompt!r}; use --prompt-template released, or a text"
        )
    return before + SOUND + PROMPT + after


def around_sound(template: str, prompt: str) -> tuple[str, str]:
    """The text before the sound and the text after it, ``{bos}`` still in them, of a resolved template.

    Only the released template keeps the spaces around the prompt, as its projector was trained with them.
    """
    text = RELEASED_TEXT if template == RELEASED else template
    if SOUND not in text:
        text = SOUND + (text if BOS in text else BOS + text)
    before, after = text.split(SOUND)
    asked = prompt if template == RELEASED else prompt.strip()
    return before.replace(PROMPT, asked), after.replace(PROMPT, asked)
