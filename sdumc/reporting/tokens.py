"""The tokens that the frames of a text feature stand for, from the language model's tokenizer if it is there."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Tokeniser:
    """The tokenizer of a language model's folder, loaded when it is first asked for."""

    def __init__(self, model: str, root: Path):
        """``model`` is the folder as the features' settings name it, relative to the recipe's folder ``root``."""
        self._paths = [folder / model / "tokenizer.json" for folder in (Path(), root)]
        self._loaded = False
        self._tokenizer: Any = None

    def __call__(self, words: str, frames: int) -> list[str]:
        """A label per frame: the tokens of ``words``, or else its words; empty if neither has ``frames`` items."""
        if not self._loaded:
            self._loaded = True
            path = next((p for p in self._paths if p.is_file()), None)
            if path is not None:
                from tokenizers import Tokenizer

                try:
                    self._tokenizer = Tokenizer.from_file(str(path))
                except Exception as e:  # the package raises plain Exception; a missing label must not stop a report
                    log.warning("%s: cannot be read (%s): no tokens beside the attention", path, e)
        if self._tokenizer is not None:
            tokens = self._tokenizer.encode(words, add_special_tokens=False).tokens
            if len(tokens) == frames:
                return [token.replace("▁", "").replace("Ġ", "") or "·" for token in tokens]
        by_word = words.split()
        return by_word if len(by_word) == frames else []
