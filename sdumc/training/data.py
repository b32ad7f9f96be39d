"""What training reads: the two dump folders, a batch under the network's input names, dropped modalities."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from sdumc.conditions import MODALITIES
from sdumc.data.dataset import Batch, UtteranceDataset
from sdumc.data.dump import Dump, load_dump
from sdumc.errors import UserError
from sdumc.model.network import SDUMC

_STATISTICS_UTTERANCES = 500


def load_sets(args: argparse.Namespace) -> tuple[Dump, Dump, list[str]]:
    """Load the train and valid dumps, fill in ``args.audio_dim`` and its like, and name the features to read.

    Raises:
        UserError: the sets differ in features or dimensions, or the train set lacks what the settings need.
    """
    names = list(MODALITIES)
    if args.flows == "both" and args.missing_text == "simulated":
        names.append("text_sim")
    train = load_dump(args.train_dir, names, require=("utt2label",))
    valid = load_dump(args.valid_dir, names, require=("utt2label",))
    # What no train utterance has, the model cannot learn to read: it is made without.
    train.features = {name: feature for name, feature in train.features.items() if feature.entries}
    used = [name for name in names if name in train.features]
    if "text" not in used:
        raise UserError(
            f"{args.train_dir}/text.scp: missing; the complete flow learns from real text, so a train set needs it"
        )
    for name in used:
        if name not in valid.features:
            raise UserError(f"{args.valid_dir}/{name}.scp: missing, but {args.train_dir} has it; run stage 3 for both")
        a, b = train.features[name].dim, valid.features[name].dim
        if a != b and valid.features[name].entries:
            raise UserError(f"{args.valid_dir}/{name}.scp: dimension {b}, but {a} in {args.train_dir}: other models?")
    if "text_sim" in used and train.features["text_sim"].dim != train.features["text"].dim:
        raise UserError(
            f"{args.train_dir}: text_sim has dimension {train.features['text_sim'].dim}, text has "
            f"{train.features['text'].dim}; both must come from the same language model"
        )
    for m in MODALITIES:
        found = train.features[m].dim if m in used else 0
        asked = getattr(args, f"{m}_dim")
        if asked and asked != found:
            raise UserError(f"--{m}-dim {asked}, but {args.train_dir}/{m}.scp has {found}; leave the option out")
        setattr(args, f"{m}_dim", found)
    return train, valid, used


def set_normalisation(model: SDUMC, train: Dump) -> None:
    """Give each projection the mean and deviation of its features over the frames of train utterances.

    Real text decides for both texts, as they share a projection. A few hundred utterances, evenly spaced, are enough.
    """
    for m in model.available:
        dataset = UtteranceDataset(train, [m])
        step = max(1, len(dataset) // _STATISTICS_UTTERANCES)
        frames, total, square = 0, torch.zeros(()), torch.zeros(())  # sums, broadcast over dimensions
        for i in range(0, len(dataset), step):
            x = dataset[i].features[m]
            if x is not None:
                x = x.double()
                frames, total, square = frames + len(x), total + x.sum(0), square + x.square().sum(0)
        if not frames:
            continue
        mean = total / frames
        deviation = (square / frames - mean.square()).clamp_min(0).sqrt()
        # A dimension that hardly moves here may move in other recordings; it must not drown out the rest there.
        floor = 0.1 * deviation.mean().clamp_min(1e-6)
        projection: Any = model.frame_projection[m]
        projection.mean.copy_(mean)
        projection.inverse_deviation.copy_(1 / deviation.clamp_min(float(floor)))


def model_inputs(batch: Batch, missing_text: str = "simulated") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features (B, T, D) and lengths (B,) as the network takes them; without ``text_sim`` if it is not wanted."""
    names = [n for n in batch.features if n != "text_sim" or missing_text == "simulated"]
    return {n: batch.features[n] for n in names}, {n: batch.lengths[n] for n in names}


def drop_modalities(lengths: dict[str, Tensor], rate: float) -> dict[str, Tensor]:
    """Take audio, video and the missing flow's text away from random utterances, each with chance ``rate``.

    Audio and video go for both flows, so that these still see the same; real text stays: a model without it is the
    missing flow's business. No utterance loses everything that a flow could read.

    Args:
        lengths: (B,) frames by input name; 0 is absent.

    Returns:
        The lengths with the dropped modalities at 0. Drawn from torch's generator on the CPU.
    """
    names = [n for n in ("audio", "video", "text_sim") if n in lengths]
    if not rate or not names:
        return lengths
    device = lengths[names[0]].device
    drop = (torch.rand(len(names), len(lengths[names[0]])) < rate).to(device)
    there = torch.stack([lengths[n] > 0 for n in names])
    left = (there & ~drop).any(dim=0)
    drop = drop & left
    return {**lengths, **{n: lengths[n].masked_fill(drop[i], 0) for i, n in enumerate(names)}}
