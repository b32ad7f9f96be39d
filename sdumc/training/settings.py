"""The options of training: one flat list, the same on the command line, in YAML and in an exp folder's config.yaml.

No torch here, so that ``--help`` is fast.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from sdumc import __version__
from sdumc.cli import Parser, at_least
from sdumc.conditions import MISSING_TEXTS, MODALITIES, SIMULATED
from sdumc.errors import UserError
from sdumc.files import read_yaml, write_text
from sdumc.hyperparameters import FUSION, IMAGINATION, POOLING, ModelConfig, ObjectiveWeights
from sdumc.machine import add_device_option
from sdumc.scale import scale_of

CONFIG = "config.yaml"
TRAIN_SETS = "train_sets.yaml"  # of a model that learned from several folders
# What may differ between a run and the run that continues it; everything else changes the result.
FREE_TO_CHANGE = frozenset({"train_dir", "valid_dir", "exp_dir", "epochs", "device", "num_workers", "save_every"})
_OF_THE_CALL = frozenset({"config", "verbose", "version", "dry_run"})  # how a process was called; not kept


def get_parser() -> Parser:
    """All options of ``sdumc.bin.train``."""
    parser = Parser(
        "Train SDUMC on a dump folder. After a kill at any moment, the same command continues where it stopped."
    )
    _add_data(parser.add_argument_group("data"))
    _add_model(parser.add_argument_group("model"))
    _add_objective(parser.add_argument_group("objective (0 leaves a term out)"))
    _add_optimisation(parser.add_argument_group("optimisation"))
    g = parser.add_argument_group("running")
    add_device_option(g)
    g.add_argument("--save-every", type=at_least(0, int), default=200, help="steps between checkpoints inside an epoch")
    g.add_argument("--dry-run", action="store_true", help="check the settings, build the model, do one step, stop")
    return parser


def _add_data(g: Any) -> None:
    g.add_argument(
        "--train-dir",
        nargs="+",
        default=[],
        metavar="DIR",
        help="dump folder to learn from, or several; labels of the others are mapped onto the scale of the first",
    )
    g.add_argument(
        "--train-weights",
        nargs="+",
        default=[],
        type=at_least(0),
        metavar="X",
        help="one for each --train-dir: how often its utterances are drawn, in proportion to the others' (1 0.5: those "
        "of the second half as often); all alike by default",
    )
    g.add_argument("--valid-dir", metavar="DIR", help="dump folder that chooses the model")
    g.add_argument("--exp-dir", metavar="DIR", help="where everything is written")
    g.add_argument("--batch-size", type=at_least(1, int), default=96, help="utterances in a batch, over all ranks")
    g.add_argument(
        "--batch-frames", type=at_least(0, int), default=0, help="padded frames in a batch at most (0: no limit)"
    )
    g.add_argument("--num-workers", type=at_least(0, int), default=2, help="threads per rank that read features ahead")
    g.add_argument(
        "--missing-text",
        choices=MISSING_TEXTS,
        default=SIMULATED,
        help="what the missing flow learns to read for text: text_sim (none where the dump has no such feature), "
        "text_asr, or none; the condition missing then reads the same",
    )
    g.add_argument(
        "--modality-dropout",
        type=at_least(0, below=1),
        default=0.1,
        help="chance that an utterance loses its audio, its video, or the missing flow's text, each on its own",
    )
    g.add_argument(
        "--normalise-features", type=_boolean, default=True, help="by the train set's mean and deviation per dimension"
    )


def _add_model(g: Any) -> None:
    default = ModelConfig
    for m in MODALITIES:
        g.add_argument(f"--{m}-dim", type=at_least(0, int), default=0, help=f"{m} features a frame (0: as in the dump)")
    g.add_argument("--dim", type=at_least(2, int), default=default.dim, help="width d of everything before the content")
    g.add_argument(
        "--content-dim", type=at_least(2, int), default=default.content_dim, help="width e of the attended content"
    )
    g.add_argument("--dropout", type=at_least(0, below=1), default=default.dropout, help="in the perceptrons")
    g.add_argument(
        "--attention-dropout",
        type=at_least(0, below=1),
        default=default.attention_dropout,
        help="around both attentions",
    )
    g.add_argument("--scale", type=at_least(0), default=default.scale, help="factor on attention scores")
    g.add_argument("--imagination", choices=IMAGINATION, default=default.imagination, help="where MIA acts")
    g.add_argument("--fusion", choices=FUSION, default=default.fusion, help="concat: no cross-attention (ablation)")
    g.add_argument(
        "--pooling",
        choices=POOLING,
        default=default.pooling,
        help="statistics: frames' mean and deviation beside attentive pooling (not in the paper)",
    )
    g.add_argument(
        "--output-range",
        type=at_least(0),
        default=default.output_range,
        metavar="X",
        help="keep predictions within +-X, by a tanh (0: no limit, as in the paper)",
    )
    g.add_argument(
        "--mask-padding",
        type=_boolean,
        default=default.mask_padding,
        help="false: attend over padding as the released network does",
    )


def _add_objective(g: Any) -> None:
    default = ObjectiveWeights()
    g.add_argument(
        "--flows",
        choices=("both", "complete", "missing"),
        default="both",
        help="complete: real text only; missing: no real text; both: what the train set allows",
    )
    terms = {
        "mse_complete": "squared error of the complete flow",
        "mse_missing": "squared error of the missing flow",
        "distil_query": "distance of the missing flow's text query to the complete flow's",
        "distil_content": "distance of the missing flow's text content to the complete flow's",
        "similarity": "distance of the two flows' utterance vectors",
        "contrast": "Rank-N-Contrast over both flows",
    }
    for name, text in terms.items():
        option = f"--{name.replace('_', '-')}"
        g.add_argument(option, type=at_least(0), default=getattr(default, name), metavar="WEIGHT", help=text)
    g.add_argument("--temperature", type=at_least(1e-6), default=default.temperature, help="of Rank-N-Contrast")


def _add_optimisation(g: Any) -> None:
    g.add_argument("--epochs", type=at_least(1, int), default=25, help="epochs; after each, the model is validated")
    g.add_argument(
        "--min-epoch-steps",
        type=at_least(1, int),
        default=1,
        help="an epoch goes over a small train set as often as it takes to have so many steps; over others once",
    )
    g.add_argument("--lr", type=at_least(0), default=1e-4, help="Adam's step size after warm-up")
    g.add_argument("--weight-decay", type=at_least(0), default=1e-5, help="of Adam (L2)")
    g.add_argument("--clip-grad", type=at_least(0), default=1.0, help="largest norm of the gradient (0: any)")
    g.add_argument("--warmup-epochs", type=at_least(0, int), default=5, help="epochs of linear warm-up")
    g.add_argument("--decay", type=at_least(0), default=0.9, help="factor on the step size ...")
    g.add_argument("--decay-every", type=at_least(1, int), default=10, help="... every so many epochs after warm-up")
    g.add_argument("--average-best", type=at_least(1, int), default=5, help="epochs in model.averaged, best on valid")
    g.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast of matrix products")
    g.add_argument("--compile", type=_boolean, default=False, help="torch.compile the network")
    g.add_argument(
        "--init",
        default="",
        metavar="PATH",
        help="weights to start from: an exp folder, a packed model, or the authors' released checkpoint (.pt)",
    )
    g.add_argument(
        "--init-lr-factor",
        type=at_least(0),
        default=1.0,
        metavar="X",
        help="factor on the step size of loaded weights",
    )
    g.add_argument("--seed", type=at_least(0, int), default=1, help="of weights, order and dropout")


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "yes"):
        return True
    if text.lower() in ("false", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")


def model_config(settings: argparse.Namespace) -> ModelConfig:
    """The network that the settings describe; the feature dimensions must be filled in."""
    return ModelConfig(**{f.name: getattr(settings, f.name) for f in fields(ModelConfig)})


def objective_weights(settings: argparse.Namespace) -> ObjectiveWeights:
    """The factor of each term of the objective."""
    return ObjectiveWeights(**{f.name: getattr(settings, f.name) for f in fields(ObjectiveWeights)})


def learning_rate(settings: argparse.Namespace, epoch: int) -> float:
    """Step size in epoch 1, 2, ...: linear warm-up, then `decay` every `decay_every` epochs."""
    if epoch <= settings.warmup_epochs:
        return settings.lr * epoch / settings.warmup_epochs
    return settings.lr * settings.decay ** ((epoch - settings.warmup_epochs - 1) // settings.decay_every)


def as_dict(settings: argparse.Namespace) -> dict[str, Any]:
    """Settings as plain values, without those that only say how this process was called."""
    values = {k: v for k, v in sorted(vars(settings).items()) if k not in _OF_THE_CALL}
    return {k: v[0] if isinstance(v, list) and len(v) == 1 else v for k, v in values.items()}


def write_config(exp_dir: Path, settings: argparse.Namespace) -> None:
    """Write every resolved setting to ``exp_dir/config.yaml``; `train --config` reads it back."""
    keys = {name.replace("_", "-"): value for name, value in as_dict(settings).items() if value != []}
    write_text(exp_dir / CONFIG, yaml.safe_dump(keys, sort_keys=True))


def load_config(exp_dir: Path) -> argparse.Namespace:
    """Read an exp folder's settings.

    Raises:
        UserError: there is no such folder, or a key is unknown.
    """
    path = exp_dir / CONFIG
    if not path.exists():
        raise UserError(f"{path}: no such file; is {exp_dir} a folder that training (stage 4) wrote?")
    values = read_yaml(path)
    parser = get_parser()
    known = vars(parser.parse_args([])).keys()
    for key in values:
        if key.replace("-", "_") not in known:
            raise UserError(
                f"{path}: unknown key {key!r}; if a newer version of sdumc wrote the file, update this one, which is "
                f"{__version__}"
            )
    words: list[str] = []
    for key, value in values.items():
        words += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return parser.parse_args(words)


def write_train_sets(exp_dir: Path, shares: Sequence[Mapping[str, Any]]) -> None:
    """Of a model that learned from several folders: which, their weights, and the scales of their labels."""
    path = exp_dir / TRAIN_SETS
    if len(shares) == 1:
        path.unlink(missing_ok=True)
        return
    scales = [scale_of(part["folder"]) for part in shares]
    content = [{**part, "labels": scale.ends} for part, scale in zip(shares, scales, strict=True)]
    write_text(path, yaml.safe_dump(content, sort_keys=False))


def read_train_sets(exp_dir: Path) -> list[dict[str, Any]]:
    """What :func:`write_train_sets` wrote; empty for a model of one folder."""
    path = exp_dir / TRAIN_SETS
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else []


def shares_in_words(shares: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each folder: its weight, its utterances, and which part it has in what is drawn."""
    drawn = [part["utterances"] * part["share"] for part in shares]
    lines = []
    for part, count in zip(shares, drawn, strict=True):
        mapped = part.get("labels", shares[0].get("labels")) != shares[0].get("labels")
        scale = f"; labels from {part['labels']}, mapped linearly to {shares[0]['labels']}" if mapped else ""
        lines.append(
            f"learned from {part['folder']} with weight {part['weight']:g}: {part['utterances']} utterances, "
            f"{100 * count / sum(drawn):.0f}% of what is drawn{scale}"
        )
    return lines
