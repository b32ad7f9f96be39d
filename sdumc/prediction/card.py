"""The README.md of a packed model: what it is, how good it was measured to be, and how to use it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from sdumc import __version__
from sdumc.conditions import CONDITIONS, by_condition
from sdumc.reporting.markdown import markdown_table
from sdumc.scoring.metrics import MEASURES, format_measure

_SHOWN = ("mae", "corr", "acc7", "acc2_non0", "f1_non0")
_ROLES = {
    "audio": "audio features",
    "encoder": "encodes the sound for the language model",
    "projector": "from the encoder's frames to the language model's inputs",
    "llm": "simulates text, and encodes text",
    "asr": "transcribes where the language model refuses",
    "vision": "video features",
}


def model_card(
    name: str,
    experiment: str,
    checkpoint: str,
    config: Mapping[str, Any],
    features: Mapping[str, Mapping[str, Any]],
    models: Sequence[Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]],
    backbones: bool,
) -> str:
    """The text of the card.

    Args:
        models: ``name`` in the pack, or on the hub; ``was``, ``roles`` and ``bytes``.
        scores: contents of score.json by set and condition.
    """
    chosen = "the epoch that is best on the valid set" if checkpoint == "valid-best" else "the mean of the best epochs"
    needs = "Everything that it needs is in this folder." if backbones else _fetching(models)
    parts = [
        "---\n" + yaml.safe_dump(_front_matter(name, scores), sort_keys=False) + "---\n",
        f"# {name}\n",
        "SDUMC: the sentiment of an utterance as one number from -3 (very negative) to 3 (very positive), from its "
        "sound, its words and its pictures. Without a transcript, text is simulated from the sound. Absent "
        "modalities are left out.\n",
        f"Experiment `{experiment}`, {chosen}. Made with sdumc {__version__}.\n",
        "## Use\n",
        f"{needs} Install sdumc, then, in the folder that holds this one:\n",
        f"```\npython -m sdumc.bin.predict --exp-dir {name} clip.mp4\n```\n",
        f'```python\nfrom sdumc import Scorer\nscorer = Scorer.load("{name}")\n'
        'print(scorer.score("clip.mp4").overall)\n```\n',
        "## Measured scores\n",
        _score_table(scores),
        "## Models inside\n" if backbones else "## Models that it works with\n",
        _model_table(models),
        "The pretrained models have licences of their own.\n",
        "## How features are made\n",
        _feature_list(features),
        f"The network's settings are in `config.yaml` (seed {config.get('seed', '?')}), the extractors' in "
        "`extractors.yaml`.\n",
        "## Limits\n",
        "Scores are meant for single utterances of speech like those of the train set: its language, its kind of "
        "speakers and recordings. A score is an estimate of what annotators would have said, not of what a speaker "
        "feels, and says nothing reliable about a single person.\n",
    ]
    return "\n".join(parts)


def _front_matter(name: str, scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    front: dict[str, Any] = {
        "library_name": "sdumc",
        "tags": ["multimodal-sentiment-analysis", "sdumc"],
    }
    results = []
    for test_set, conditions in scores.items():
        metrics = [
            {"type": m, "name": f"{MEASURES[m]}, {condition}", "value": round(float(values[m]), 4)}
            for condition, values in conditions.items()
            for m in _SHOWN
            if values[m] is not None
        ]
        results.append(
            {
                "task": {"type": "multimodal-sentiment-analysis", "name": "Multimodal sentiment analysis"},
                "dataset": {"type": test_set, "name": test_set},
                "metrics": metrics,
            }
        )
    if results:
        front["model-index"] = [{"name": name, "results": results}]
    return front


def _score_table(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    if not scores:
        return "None were measured with this checkpoint.\n"
    rows = [
        (
            test_set,
            condition,
            CONDITIONS[condition].given if condition in CONDITIONS else "",
            conditions[condition]["n"],
            *(_cell(conditions[condition], m) for m in _SHOWN),
        )
        for test_set, conditions in scores.items()
        for condition in sorted(conditions, key=by_condition)
    ]
    table = markdown_table(("set", "condition", "it reads", "n", *(MEASURES[m] for m in _SHOWN)), rows, left=3)
    note = (
        "`missing` is what a clip without a transcript gets, `full` one with. Accuracies and F1 in per cent. In "
        "brackets, where they were computed, 95% intervals.\n"
    )
    return f"{table}\n\n{note}"


def _cell(scores: Mapping[str, Any], measure: str) -> str:
    """A measure with its interval; scores of earlier versions have none."""
    value, interval = scores[measure], scores.get("intervals", {}).get(measure)
    return format_measure(measure, math.nan if value is None else value, interval=interval)


def _model_table(models: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            f"`{m['name']}`",
            ", ".join(_ROLES[r] for r in m["roles"]),
            f"{m['bytes'] / 1e6:.1f} MB" if m["bytes"] else "not packed",
        )
        for m in models
    ]
    return markdown_table(("model", "for", "size"), rows, left=2) + "\n"


def _fetching(models: Sequence[Mapping[str, Any]]) -> str:
    names = [m["name"] for m in models if not m["bytes"]]
    commands = "\n".join(f"hf download {n}" for n in names)
    return (
        "The large pretrained models are not in this folder. Fetch them into the hub's cache first, or have their "
        f"folders in one place and name that with `--model-dir`:\n\n```\n{commands}\n```\n\n"
    )


def _feature_list(features: Mapping[str, Mapping[str, Any]]) -> str:
    keys = (
        "layers",
        "frame_rate",
        "pooling",
        "detector",
        "context",
        "prompt",
        "prompt_template",
        "beam",
        "first_state",
        "dtype",
        "dim",
    )
    lines = []
    for name in sorted(features):
        said = [f"{k} {features[name][k]!r}" for k in keys if features[name].get(k) is not None]
        lines.append(f"* {name}: {', '.join(said)}")
    return "\n".join(lines) + "\n"
