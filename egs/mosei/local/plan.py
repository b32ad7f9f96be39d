#!/usr/bin/env python3
"""Disk space that the recipe needs and, from the throughput of a machine, GPU-hours of each stage.

It starts from the corpus and the models of the recipe whose folder it is called from (egs/mosei, egs/mosi, egs/sims).
The formulas are those of egs/mosei/README.md. Throughput has no defaults: `python -m sdumc.bench` measures it on the
machine in question, and the logs of stages 2 and 3 state it after the first utterances.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

FLOAT = 4  # bytes
AUDIO_RATE = 50  # frames a second of WavLM and Whisper


class Recipe(NamedTuple):
    """A corpus: clips, hours, share of the train set, tokens a clip; dimensions of audio, text and video."""

    clips: int
    hours: float
    train_share: float
    tokens: float
    dims: dict[str, tuple[int, int, int]]


_WAVLM = {"large": (1024, 4096, 1024), "small": (768, 576, 768)}  # Vicuna-7B or SmolLM2-135M, CLIP
_WHISPER = {"large": (1280, 3584, 1024), "small": (512, 896, 768)}  # Whisper-large-v3 or -base, Qwen2.5, CLIP
RECIPES = {
    "mosei": Recipe(22856, 46.0, 0.714, 26.0, _WAVLM),
    "mosi": Recipe(2199, 2.6, 0.584, 16.0, _WAVLM),
    "sims": Recipe(2281, 2.3, 0.6, 15.0, _WHISPER),  # a token a Chinese character, at most
}


def own_recipe() -> str:
    """The recipe in whose folder this file was called (a link in some of them); MOSEI elsewhere."""
    name = Path(__file__).absolute().parents[1].name
    return name if name in RECIPES else "mosei"


def get_parser() -> argparse.ArgumentParser:
    recipe = RECIPES[own_recipe()]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    g = parser.add_argument_group("corpus")
    g.add_argument("--data-dir", help="take clips and hours from DIR/*/utt2dur, that is, after stage 1")
    g.add_argument("--clips", type=int, default=recipe.clips, help="N")
    g.add_argument("--hours", type=float, default=recipe.hours, help="H, sound in all clips")
    g.add_argument("--train-share", type=float, default=recipe.train_share, help="share of the clips in the train set")
    g.add_argument("--tokens", type=float, default=recipe.tokens, help="L, tokens of the LLM a clip")
    g = parser.add_argument_group("features")
    g.add_argument("--models", choices=recipe.dims, default="large", help="of the recipe; gives the dimensions")
    for i, name in enumerate(("audio", "text", "video")):
        dims = ", ".join(f"{models} {d[i]}" for models, d in recipe.dims.items())
        g.add_argument(f"--{name}-dim", type=int, help=f"of other models ({dims})")
    g.add_argument("--fps", type=float, default=5.0)
    g = parser.add_argument_group("throughput of one GPU (0: not known)")
    g.add_argument("--asr", type=float, default=0.0, help="a, recognition: hours of sound an hour")
    g.add_argument("--simulation", type=float, default=0.0, help="s, text simulation: utterances a second")
    g.add_argument("--audio", type=float, default=0.0, help="w, audio features: hours of sound an hour")
    g.add_argument("--text", type=float, default=0.0, help="t, text features: utterances a second")
    g.add_argument("--pictures", type=float, default=0.0, help="p, faces and video features: pictures a second")
    g.add_argument("--projector-step", type=float, default=0.0, help="seconds a step, if a projector is trained")
    g.add_argument("--projector-steps", type=int, default=100000)
    g.add_argument("--projector-folds", type=int, default=5, help="F, projectors for cross-fitting; 0: none")
    g.add_argument("--train-step", type=float, default=0.0, help="b, training: seconds a batch of 96")
    g.add_argument("--epochs", type=int, default=25)
    return parser


def gpu_hours(a: argparse.Namespace) -> dict[str, float | None]:
    """Hours of one GPU by step; None where the throughput is not known."""

    def over(amount: float, speed: float) -> float | None:
        return amount / speed if speed else None

    batches = -(-a.clips * a.train_share // 96)
    projectors = 1 + (a.projector_folds if a.projector_folds > 1 else 0)
    return {
        "2 projector x (1 + F), if none is given": projectors * a.projector_steps * a.projector_step / 3600 or None,
        "2 text_asr            H / a": over(a.hours, a.asr),
        "2 text_sim            N / s": over(a.clips / 3600, a.simulation),
        "3 audio               H / w": over(a.hours, a.audio),
        "3 text and text_asr   2 N / t": over(2 * a.clips / 3600, a.text),
        "3 video               H fps / p": over(a.hours * a.fps, a.pictures),
        "4 train, each seed    epochs (N_train / 96) b": a.epochs * batches * a.train_step / 3600 or None,
    }


def gigabytes(a: argparse.Namespace) -> dict[str, float]:
    """Size of the features on disk."""
    seconds = a.hours * 3600
    return {
        "audio     H 3600 50 D": seconds * AUDIO_RATE * a.audio_dim * FLOAT / 1e9,
        "text      N L D": a.clips * a.tokens * a.text_dim * FLOAT / 1e9,
        "text_sim  N L D": a.clips * a.tokens * a.text_dim * FLOAT / 1e9,
        "text_asr  N L D": a.clips * a.tokens * a.text_dim * FLOAT / 1e9,
        "video     H 3600 fps D": seconds * a.fps * a.video_dim * FLOAT / 1e9,
    }


def main() -> None:
    a = get_parser().parse_args()
    for name, dim in zip(("audio", "text", "video"), RECIPES[own_recipe()].dims[a.models], strict=True):
        if getattr(a, f"{name}_dim") is None:
            setattr(a, f"{name}_dim", dim)
    if a.data_dir:
        lines = [
            line.split() for f in sorted(Path(a.data_dir).glob("*/utt2dur")) for line in f.read_text().splitlines()
        ]
        if not lines:
            raise SystemExit(f"error: {a.data_dir}: no utt2dur in its folders; stage 1 writes them")
        a.clips, a.hours = len(lines), sum(float(seconds) for _, seconds in lines) / 3600
    print(f"{a.clips} clips, {a.hours:.1f} hours\n\nfeatures on disk, GB (four bytes a number)")
    sizes = gigabytes(a)
    for name, size in sizes.items():
        print(f"  {name:<46} {size:6.1f}")
    print(f"  {'all':<46} {sum(sizes.values()):6.1f}\n\nhours of one GPU (or of one machine without)")
    for name, hours in gpu_hours(a).items():
        print(f"  {name:<46} {'     ?' if hours is None else f'{hours:6.1f}'}")


if __name__ == "__main__":
    main()
