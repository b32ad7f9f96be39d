"""The README.md of a packed model: what it is, how good it was measured to be, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from sdumc import __version__
from sdumc.conditions import CONDITIONS

_MEASURES = (
    ("mae", "MAE"),
    ("corr", "Corr"),
    ("acc7", "Acc-7"),
    ("acc2_non0", "Acc-2 (non0)"),
    ("f1_non0", "F1 (non0)"),
)
_ROLES = {
    "audio": "audio features",
    "encoder": "hears for the language model",
    "projector": "between encoder and language model",
    "llm": "simulates text, and reads it",
    "asr": "stands in where the language model refuses",
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
        "sound, its words and its pictures. Where nobody has written the words down, they are simulated from the "
        "sound; modalities that are not there are done without.\n",
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
            {"type": key, "name": f"{title}, {condition}", "value": round(float(values[key]), 4)}
            for condition, values in conditions.items()
            for key, title in _MEASURES
            if values.get(key) is not None
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
    lines = ["| set | condition | it reads | n | " + " | ".join(t for _, t in _MEASURES) + " |"]
    lines.append("|---|---|---|--:|" + "--:|" * len(_MEASURES))
    for test_set, conditions in scores.items():
        known = [c for c in CONDITIONS if c in conditions]
        for condition in [*known, *(c for c in conditions if c not in CONDITIONS)]:
            values = conditions[condition]
            meaning = CONDITIONS[condition].given if condition in CONDITIONS else ""
            cells = [_number(key, values.get(key)) for key, _ in _MEASURES]
            lines.append(
                f"| {test_set} | {condition} | {meaning} | {values.get('n', '-')} | " + " | ".join(cells) + " |"
            )
    note = "`missing` is what a clip without a transcript gets, `full` one with. Accuracies and F1 in per cent.\n"
    return "\n".join(lines) + "\n\n" + note


def _number(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if key in ("mae", "corr") else f"{100 * value:.1f}"


def _model_table(models: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| model | for | size |", "|---|---|--:|"]
    for m in models:
        roles = ", ".join(_ROLES[r] for r in m["roles"])
        size = f"{m['bytes'] / 1e6:.1f} MB" if m["bytes"] else "not packed"
        lines.append(f"| `{m['name']}` | {roles} | {size} |")
    return "\n".join(lines) + "\n"


def _fetching(models: Sequence[Mapping[str, Any]]) -> str:
    names = [m["name"] for m in models if not m["bytes"]]
    commands = "\n".join(f"hf download {n}" for n in names)
    return (
        "The large pretrained models are not in this folder. Fetch them into the hub's cache first, or have their "
        f"folders in one place and name that with `--model-dir`:\n\n```\n{commands}\n```\n\n"
    )


def _feature_list(features: Mapping[str, Mapping[str, Any]]) -> str:
    keys = ("layers", "frame_rate", "pooling", "detector", "context", "prompt", "beam", "first_state", "dtype", "dim")
    lines = []
    for name in sorted(features):
        said = [f"{k} {features[name][k]!r}" for k in keys if features[name].get(k) is not None]
        lines.append(f"* {name}: {', '.join(said)}")
    return "\n".join(lines) + "\n"
