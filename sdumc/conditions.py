"""Every name of a modality, feature, text, query, flow, condition and text status, once. Quick to import: no torch.

Shell scripts ask this module, ``python3 -m sdumc.conditions``, instead of keeping lists of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sdumc.errors import UserError, answer_shell

T = TypeVar("T")

USAGE = """usage:
  python3 -m sdumc.conditions check "NAME ..."              exit code 2 for an unknown name, with a list of the known
  python3 -m sdumc.conditions check-protocols "NAME ..."    the same for protocols
  python3 -m sdumc.conditions possible DUMP_DIR "NAME ..." [MISSING_TEXT [EXP_DIR]]
                                                            the conditions that the dump's features and the model
                                                            allow, one a line"""

MODALITIES = ("audio", "text", "video")

# Text that a set can have, as data/<set>/<name> in words and dump/<set>/<name>.scp in features; what people call it.
TEXTS = {"text": "real text", "text_sim": "simulated text", "text_asr": "ASR text"}
FEATURES = ("audio", *TEXTS, "video")  # of a dump folder

# Shards of the recogniser's transcripts. `text_asr` names what comes of them: the words in data/<set>/, and in the dump
# the features made of these words. `asr` is the condition that reads those features, and the recogniser's own role.
ASR_SHARDS = "asr_hyp"

# Shards with transcripts in them, and the file of data/<set>/ that these become.
TRANSCRIPTS = {ASR_SHARDS: "text_asr", "text_sim": "text_sim"}

# What became of a transcript that a model wrote; sdumc.pretrained.quality tells them apart.
NO_SPEECH = "no-speech"
TEXT_STATUSES = ("ok", "empty", NO_SPEECH, "refusal", "repeat", "limit")

# How stage 2 finds clips without speech: by Silero's voice activity detector, or by their level alone.
SPEECH_TESTS = ("detector", "level")

# The seven queries of cross-attention. The first four sum the weighted vectors of several modalities.
FUSED_QUERIES = {
    "fused": MODALITIES,
    "audio+text": ("audio", "text"),
    "text+video": ("text", "video"),
    "audio+video": ("audio", "video"),
}
QUERIES = (*FUSED_QUERIES, *MODALITIES)

# The two flows of the network, and the input of the network that is the text of each.
COMPLETE, MISSING = "complete", "missing"
TEXT_OF_FLOW = {COMPLETE: "text", MISSING: "text_sim"}

# What the missing flow reads for text (`train --missing-text`), and the feature that this is. The flow is trained and
# scored with the same one; its input keeps its name.
SIMULATED = "simulated"
MISSING_TEXTS = {SIMULATED: "text_sim", "asr": "text_asr", "none": None}


def modality(feature: str) -> str:
    """The modality of a feature or of an input of the network: ``text`` for all kinds of text."""
    return "text" if feature in TEXTS else feature


@dataclass(frozen=True)
class Condition:
    """What a trained model is given when it is scored."""

    name: str
    features: tuple[str, ...]  # of the dump, in the order of MODALITIES
    given: str  # the features in words
    short: str  # which text it is, or what is left out, in two words
    flow: str = MISSING  # the flow that is asked; in `asr`, ASR text is read as real text is

    @property
    def text(self) -> str | None:
        """The text feature that the condition is about, if there is one."""
        return next((f for f in self.features if f in TEXTS), None)

    @property
    def required(self) -> str | None:
        """The feature without which the condition makes no sense: the text of the complete flow.

        That of the missing flow is not required: without it, ``missing`` means the same as ``none``.
        """
        return self.text if self.flow == COMPLETE else None

    @property
    def inputs(self) -> dict[str, str]:
        """The features by the network's input names: audio, text or (missing flow) text_sim, video."""
        return {TEXT_OF_FLOW[self.flow] if f in TEXTS else f: f for f in self.features}

    def is_possible(self, features: Collection[str]) -> bool:
        """Whether a set with these features can be scored under the condition."""
        return any(f in features for f in self.features) and self.required in (None, *features)


# In the order of tables and legends.
CONDITIONS = {
    c.name: c
    for c in (
        Condition("full", ("audio", "text", "video"), "audio, real text, video", "real text", COMPLETE),
        Condition("missing", ("audio", "text_sim", "video"), "audio, simulated text, video", "simulated text"),
        Condition("asr", ("audio", "text_asr", "video"), "audio, ASR text, video", "ASR text", COMPLETE),
        Condition("none", ("audio", "video"), "audio and video, no text", "no text"),
        Condition("audio", ("audio",), "audio only", "nothing else"),
        Condition("text", ("text",), "real text only", "nothing else", COMPLETE),
        Condition("video", ("video",), "video only", "nothing else"),
        Condition("audio+text", ("audio", "text"), "audio and real text", "no video", COMPLETE),
        Condition("audio+video", ("audio", "video"), "audio and video: the same as none", "no text"),
        Condition("text+video", ("text", "video"), "real text and video", "no audio", COMPLETE),
    )
}
MAIN_CONDITIONS = ("full", "missing", "asr", "none")  # what recipes decode, and figures show
# What training scores on the valid set after every epoch, by the flow that it trains.
VALID_CONDITIONS = {COMPLETE: "full", MISSING: "missing"}

# `missing` for a model whose missing flow has learned with other text than simulated one.
_MISSING_WITH = {
    "asr": Condition(
        "missing",
        ("audio", "text_asr", "video"),
        "audio, ASR text in the missing flow, video",
        "ASR text, missing flow",
    ),
    "none": Condition("missing", ("audio", "video"), "audio and video, no text", "no text (--missing-text none)"),
}


def in_words(features: Iterable[str]) -> str:
    """Features as people call them: ``audio, real text, video``; ``real text only``; ``audio and video, no text``."""
    found = sorted(set(features), key=FEATURES.index)
    names = [TEXTS.get(f, f) for f in found]
    if len(names) == 1:
        return f"{names[0]} only"
    if any(f in TEXTS for f in found):
        return ", ".join(names) if len(names) > 2 else " and ".join(names)
    return f"{' and '.join(names)}, no text"


def condition_of(name: str, missing_text: str = SIMULATED) -> Condition:
    """A condition for a model whose missing flow reads ``missing_text``, one of :data:`MISSING_TEXTS`."""
    return _MISSING_WITH[missing_text] if name == "missing" and missing_text != SIMULATED else CONDITIONS[name]


@dataclass(frozen=True)
class Protocol:
    """How the field measures a model on incomplete data; see ``docs/metrics.md`` for sources."""

    name: str
    given: str  # what the model is given, in words
    rates: tuple[float, ...] = ()  # of loss; empty where nothing is drawn


PATTERNS = ("full", "audio+text", "audio+video", "text+video", "audio", "text", "video")  # real text, or none
PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("patterns", "every non-empty set of modalities, the same for all utterances"),
        Protocol("frames", "each frame of each modality erased with chance r", tuple(k / 10 for k in range(10))),
        Protocol("modalities", "each modality of an utterance lost with chance r", tuple(k / 10 for k in range(10))),
    )
}
PROTOCOL_RECORD = "protocol.yaml"  # written last into decode_<set>/protocols/<protocol>/
PROTOCOL_CONDITIONS = ("full", "missing")  # what frames and modalities are taken from, as far as a set has them


def known(names: Iterable[str], table: Mapping[str, T], kind: str) -> list[T]:
    """The entries of :data:`CONDITIONS` or :data:`PROTOCOLS` with these names; ``kind`` says in one word what they are.

    Raises:
        UserError: a name is unknown; the known ones are listed.
    """
    names = list(names)
    for name in names:
        if name not in table:
            raise UserError(f"there is no {kind} {name!r}; the {kind}s are: {', '.join(table)}")
    return [table[name] for name in names]


def by_condition(name: str) -> tuple[int, str]:
    """A key to sort by: the order of :data:`CONDITIONS`, and then unknown names, from folders, by the alphabet."""
    return (list(CONDITIONS).index(name), "") if name in CONDITIONS else (len(CONDITIONS), name)


def possible_conditions(
    dump_dir: Path, names: Iterable[str], missing_text: str = SIMULATED, exp_dir: str | None = None
) -> list[str]:
    """Those of the named conditions that the features of a dump folder allow; see :func:`condition_of`.

    A feature that all utterances lack has an empty table, and counts as not there.

    Args:
        exp_dir: only conditions that are about what this model was made with.
    """
    scps = {f: dump_dir / f"{f}.scp" for f in FEATURES}
    features = [f for f, scp in scps.items() if scp.is_file() and scp.stat().st_size]
    wanted = [condition_of(c.name, missing_text) for c in known(names, CONDITIONS, "condition")]
    if exp_dir is not None:
        from sdumc.files import read_yaml

        config = read_yaml(Path(exp_dir, "config.yaml"))
        features = [f for f in features if config.get(f"{modality(f)}-dim", 1)]
        wanted = [c for c in wanted if c.flow == MISSING or config.get("flows") != MISSING]
    return [c.name for c in wanted if c.is_possible(features)]


def answer(arguments: list[str]) -> bool:
    """Answer a shell script: :func:`sdumc.errors.answer_shell`."""
    match arguments:
        case ["check", *words]:
            known(" ".join(words).split(), CONDITIONS, "condition")
        case ["check-protocols", *words]:
            known(" ".join(words).split(), PROTOCOLS, "protocol")
        case ["possible", dump_dir, words, *rest] if rest[2:] == [] and {*rest[:1]} <= {*MISSING_TEXTS}:
            for name in possible_conditions(Path(dump_dir), words.split(), *rest):
                print(name)
        case _:
            return False
    return True


if __name__ == "__main__":
    sys.exit(answer_shell(answer, USAGE))
