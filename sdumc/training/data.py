"""What the trainings read. The network: two dump folders, their dimensions and statistics; and dropped modalities.
The projector: transcripts, and frames of the speech encoder.
"""

from __future__ import annotations

import logging
import math
import random
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdumc.conditions import (
    COMPLETE,
    MISSING,
    MISSING_TEXTS,
    MODALITIES,
    TEXT_OF_FLOW,
    TEXTS,
    VALID_CONDITIONS,
    in_words,
    modality,
)
from sdumc.data.batches import UtteranceDataset
from sdumc.data.dump import Dump, Feature, load_dump
from sdumc.data.kaldi_dir import KaldiDir
from sdumc.errors import UserError
from sdumc.extraction.loop import Progress, make_batches, read_ahead, read_wave
from sdumc.model.network import SDUMC
from sdumc.pretrained.speech import SpeechEncoder
from sdumc.scale import SCALE, declared_scale, looks_like_classes

log = logging.getLogger("sdumc")

_STATISTICS_UTTERANCES = 500


def load_sets(settings: Namespace) -> tuple[Dump, Dump]:
    """Load the train and valid dumps; the train set holds the features to learn from and no others.

    Raises:
        UserError: the sets differ in features or dimensions, or the train set lacks what the settings need.
    """
    names, missing_text = [*MODALITIES], None
    if settings.flows == "both" and (missing_text := MISSING_TEXTS[settings.missing_text]):
        names.append(missing_text)
    train_weights(settings)  # refuses wrong ones before anything is read
    parts = [load_dump(folder, names, require=("utt2label",)) for folder in settings.train_dir]
    valid = load_dump(settings.valid_dir, names, require=("utt2label",))
    check_scales(parts, valid)
    own = {name for name, feature in parts[0].features.items() if feature.entries}  # of the first folder
    train = parts[0] if len(parts) == 1 else join_dumps(parts)
    # A model cannot learn to read what no train utterance has: it is made without.
    train.features = {name: feature for name, feature in train.features.items() if feature.entries}
    if not train.features:
        raise UserError(f"{train.path}: no utterance has audio, text or video; there is nothing to learn from")
    if settings.flows == "complete" and "text" not in train.features:
        raise UserError(f"{train.path}/text.scp: missing; the complete flow learns from real text")
    for name, feature in train.features.items():
        if name not in valid.features:
            if name == "text" and settings.flows != "complete" and len(train.features) > 1:
                continue  # the epoch is chosen without real text
            if name not in own:
                log.info("%s has no %s: the epoch is chosen without", valid.path, name)
                continue
            raise UserError(f"{valid.path}/{name}.scp: missing, but {train.path} has it; run stage 3 for both")
        dim = valid.features[name].dim
        if dim != feature.dim and valid.features[name].entries:
            raise UserError(
                f"{valid.path}/{name}.scp: dimension {dim}, but {feature.dim} in {train.path}: other models?"
            )
    text, other = train.features.get("text"), train.features.get(missing_text or "")
    if text and other and other.dim != text.dim:
        raise UserError(
            f"{train.path}: {missing_text} has dimension {other.dim}, text has {text.dim}; both must come from the "
            "same language model"
        )
    if settings.missing_text == "asr" and missing_text and not other:
        raise UserError(
            f"{train.path}/{missing_text}.scp: missing, but --missing-text asr needs it; run stages 2 and 3 with a "
            "recogniser and an LLM"
        )
    if (flows := flows_of(settings, train)) and not valid_conditions(flows, valid):
        raise UserError(
            f"{valid.path}: has nothing of what is trained ({in_words(train.features)}) to choose an epoch by"
        )
    if text and text.absent:
        log.info("%d of %d train utterances have no real text", len(text.absent), len(train.utterances))
    if flows != (COMPLETE,):
        log.info("text of the missing flow: %s", TEXTS[missing_text] if missing_text and other else "none")
    return train, valid


def join_dumps(parts: Sequence[Dump]) -> Dump:
    """Several dump folders as one set, with labels on the first one's scale.

    Corpora may share names of utterances, so these get the folder's number before them. A feature that a folder does
    not have is absent in its utterances.

    Raises:
        UserError: a feature has different dimensions in two folders.
    """
    first = parts[0]
    joined = Dump(first.path, [], {}, {}, scale=first.scale, sizes=[len(part.utterances) for part in parts])
    new_name = [{utt: f"{i}:{utt}" for utt in part.utterances} for i, part in enumerate(parts, start=1)]
    for part, names in zip(parts, new_name, strict=True):
        joined.utterances += names.values()
        joined.origin |= {name: (part.path, utt) for utt, name in names.items()}
        ends = (part.scale.low, part.scale.high)
        same = ends == (first.scale.low, first.scale.high)
        if not same:
            log.info("%s: labels from %s are mapped linearly to %s", part.path, part.scale.ends, first.scale.ends)
        for utt, label in part.labels.items():
            joined.labels[names[utt]] = label if same else first.scale.from_network(part.scale.to_network(label))
    for feature in dict.fromkeys(name for part in parts for name in part.features):
        having = [part for part in parts if feature in part.features and part.features[feature].entries]
        if having:
            joined.features[feature] = _join_feature(feature, parts, having, new_name)
    return joined


def _join_feature(
    name: str, parts: Sequence[Dump], having: Sequence[Dump], new_name: Sequence[Mapping[str, str]]
) -> Feature:
    """One feature of several folders, of which those in ``having`` have it."""
    first = having[0].features[name]
    result = Feature(name, first.dim, meta=first.meta)
    for part, names in zip(parts, new_name, strict=True):
        if part not in having:
            log.info("%s: has no %s", part.path, name)
            result.absent |= dict.fromkeys(names.values(), f"no {name} in {part.path}")
            continue
        found = part.features[name]
        if found.dim != first.dim:
            raise UserError(
                f"{part.path}/{name}.scp: dimension {found.dim}, but {first.dim} in {having[0].path}/{name}.scp; make "
                "the feature with the same model for both, or leave one folder out of --train-dir"
            )
        for key in ("model_hash", "layers", "layer", "pooling"):
            a, b = first.meta.get(key), found.meta.get(key)
            if a is not None and b is not None and a != b:
                log.warning("%s: %s of %s is %s, but %s in %s", part.path, key, name, b, a, having[0].path)
        result.entries |= {names[utt]: place for utt, place in found.entries.items()}
        result.frames |= {names[utt]: count for utt, count in found.frames.items()}
        result.absent |= {names[utt]: reason for utt, reason in found.absent.items()}
    return result


def train_weights(settings: Namespace) -> list[float]:
    """The weight of each folder to learn from.

    Raises:
        UserError: there are not as many weights as folders, or one is 0 or infinite.
    """
    folders = settings.train_dir
    weights: list[float] = settings.train_weights or [1.0] * len(folders)
    if len(weights) != len(folders):
        raise UserError(f"--train-weights: {len(weights)} for {len(folders)} --train-dir; give one for each")
    if not all(0 < weight < math.inf for weight in weights):
        raise UserError("--train-weights must be finite and above 0; leave out a --train-dir that is not to count")
    places = [Path(folder).resolve() for folder in folders]
    if doubled := [folder for folder, place in zip(folders, places, strict=True) if places.count(place) > 1]:
        raise UserError(f"--train-dir: {doubled[0]} is there twice; leave it out, or give it a --train-weights")
    return weights


def train_shares(settings: Namespace, train: Dump) -> list[dict[str, Any]]:
    """Of each folder to learn from: its path, weight, number of utterances, and the share that a pass draws of them.

    The folder of the largest weight is drawn whole.
    """
    weights = train_weights(settings)
    sizes = train.sizes or [len(train.utterances)]
    return [
        {"folder": str(folder), "weight": weight, "utterances": size, "share": weight / max(weights)}
        for folder, weight, size in zip(settings.train_dir, weights, sizes, strict=True)
    ]


def flows_of(settings: Namespace, train: Dump) -> tuple[str, ...]:
    """The flows that a train set allows: the complete one reads real text, the missing one everything else.

    A corpus of text alone has the first only, one without transcripts the second only.
    """
    asked = {"both": (COMPLETE, MISSING), "complete": (COMPLETE,), "missing": (MISSING,)}[settings.flows]
    able = {COMPLETE: "text" in train.features, MISSING: bool(train.features.keys() - {"text"})}
    return tuple(flow for flow in asked if able[flow])


def valid_conditions(flows: Sequence[str], valid: Dump) -> list[str]:
    """The conditions that choose the epoch: one for each flow, as far as the valid set has what it reads."""
    has = {name for name, feature in valid.features.items() if feature.entries}
    able = {COMPLETE: "text" in has, MISSING: bool(has - {"text"})}
    return [VALID_CONDITIONS[flow] for flow in flows if able[flow]]


def as_inputs(by_feature: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a batch of the train set has by feature, by the network's input names: its only text besides the real one is
    that of the missing flow."""
    return {name if name in MODALITIES else TEXT_OF_FLOW[MISSING]: x for name, x in by_feature.items()}


def check_scales(parts: Sequence[Dump], valid: Dump) -> None:
    """Refuse labels that look like class numbers and are not declared to be sentiment, and two scales in one corpus.

    Of several folders to learn from, the first is of the corpus that the valid set is of.

    Raises:
        UserError: naming the folder, and what to declare.
    """
    for part in parts:
        if declared_scale(part.path) is None and (question := looks_like_classes(part.labels.values())):
            raise UserError(f"{part.path}/utt2label: {question}")
    train = parts[0]
    if train.scale != valid.scale:
        raise UserError(
            f"{valid.path}/{SCALE}: labels from {valid.scale.ends} ({valid.scale.scheme}), but {train.path} has "
            f"{train.scale.ends} ({train.scale.scheme}); declare one scale for both"
        )


def with_dimensions(settings: Namespace, train: Dump) -> Namespace:
    """The settings with the train set's features per frame filled in, 0 for a modality that it does not have, and with
    the flows that it allows.

    Raises:
        UserError: a dimension was asked for, and the train set has another one.
    """
    found = {m: train.features[m].dim if m in train.features else 0 for m in MODALITIES}
    for name, feature in train.features.items():  # text of the missing flow alone
        found[modality(name)] = found[modality(name)] or feature.dim
    for m, dim in found.items():
        asked = getattr(settings, f"{m}_dim")
        if asked and asked != dim:
            raise UserError(f"--{m}-dim {asked}, but {train.path}/{m}.scp has {dim}; leave the option out")
    flows = flows_of(settings, train)
    if not flows:
        raise UserError(f"{train.path}: --flows {settings.flows}, but the train set has not what this flow reads")
    name = "both" if len(flows) == 2 else flows[0]
    return Namespace(**{**vars(settings), "flows": name, **{f"{m}_dim": dim for m, dim in found.items()}})


def set_normalisation(model: SDUMC, train: Dump) -> None:
    """Give each projection the mean and deviation of its features over the frames of train utterances.

    Real and simulated text share a projection, which gets the statistics of real text. A few hundred utterances, evenly
    spaced, are enough.
    """
    for m in model.available:
        name = m if m in train.features else next(f for f in train.features if modality(f) == m)
        dataset = UtteranceDataset(train, [name])
        step = max(1, len(dataset) // _STATISTICS_UTTERANCES)
        frames, total, square = 0, torch.zeros(()), torch.zeros(())  # sums, broadcast over dimensions
        for i in range(0, len(dataset), step):
            x = dataset[i].features[name]
            if x is not None:
                x = x.double()
                frames, total, square = frames + len(x), total + x.sum(0), square + x.square().sum(0)
        if not frames:
            continue
        mean = total / frames
        deviation = (square / frames - mean.square()).clamp_min(0).sqrt()
        # A dimension that hardly varies here may vary in other recordings, and would then dominate without a floor.
        floor = 0.1 * deviation.mean().clamp_min(1e-6)
        projection: Any = model.frame_projection[m]
        projection.mean.copy_(mean)
        projection.inverse_deviation.copy_(1 / deviation.clamp_min(float(floor)))


def drop_modalities(lengths: dict[str, Tensor], rate: float) -> dict[str, Tensor]:
    """Take audio, video and the missing flow's text away from random utterances, each with chance ``rate``.

    Audio and video are taken from both flows, which must see the same ones. Real text is never dropped: the missing
    flow covers that case. No utterance loses everything that the missing flow reads.

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


_BATCH = 16  # utterances that are encoded or validated at once
_ENCODED_SECONDS = 200.0  # most seconds of sound in such a batch, padded


class TranscribedSpeech:
    """Utterances with sound and transcript; encoder outputs are kept in memory while there is room.

    Raises:
        UserError: there are no transcripts. When reading: sound cannot be read.
    """

    def __init__(self, data: KaldiDir, texts: Mapping[str, str], encoder: SpeechEncoder, cache_bytes: int):
        if not texts:
            raise UserError(f"{data.path}: training a projector needs transcripts, and there is no text")
        if missing := len(data.utterances) - len(data.text):
            log.info("%s: %d of %d utterances have no transcript", data.path, missing, len(data.utterances))
        self.data, self.texts, self.encoder = data, texts, encoder
        self.room = cache_bytes
        self._kept: dict[str, Tensor] = {}

    @property
    def utterances(self) -> list[str]:
        return [utt for utt in self.data.utterances if utt in self.texts]

    def batches(self, utterances: Sequence[str], seconds: float) -> list[list[str]]:
        """Fixed batches of similar length, at most so many seconds of sound each."""
        return make_batches({u: self.data.utt2dur.get(u, 0.0) for u in utterances}, _BATCH, seconds)

    def fill_cache(self, utterances: Sequence[str]) -> None:
        """Encode ``utterances`` until there is no more room.

        This happens in fixed batches before the first step, so that what is kept, and its last bits, do not depend on
        the step at which a resumed run begins.
        """
        log.info("%s: encoding %d utterances before the first step", self.data.path, len(utterances))
        progress = Progress(len(utterances))
        batches = self.batches(utterances, _ENCODED_SECONDS)
        for batch, waves in read_ahead(batches, lambda b: [read_wave(self.data, u) for u in b]):
            for utt, frames in zip(batch, self.encoder(waves), strict=True):
                size = frames.numel() * frames.element_size()
                if size > self.room:
                    log.info("%s: %d of %d clips kept in memory", self.data.path, len(self._kept), len(utterances))
                    return
                self.room -= size
                self._kept[utt] = frames.cpu()
            progress.step(len(batch))

    def read(self, batch: Sequence[str]) -> dict[str, np.ndarray]:
        """The sound of those utterances whose frames are not kept; called in a thread ahead of time."""
        return {u: read_wave(self.data, u) for u in batch if u not in self._kept}

    def frames(self, batch: Sequence[str], waves: Mapping[str, np.ndarray]) -> list[Tensor]:
        """Encoder frames (T_i, D) of a batch, given what :meth:`read` returned for it."""
        todo = [u for u in batch if u not in self._kept]
        fresh = dict(zip(todo, self.encoder([waves[u] for u in todo]) if todo else [], strict=True))
        return [fresh[u] if u in fresh else self._kept[u].to(self.encoder.device) for u in batch]


def epoch_batches(utterances: Sequence[str], batch_size: int, seed: int, epoch: int) -> list[list[str]]:
    """Shuffled batches of an epoch, the same for the same seed; a short last batch is kept."""
    order = sorted(utterances)
    random.Random(f"{seed} {epoch}").shuffle(order)
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def spread(utterances: Sequence[str], count: int) -> list[str]:
    """At most ``count`` utterances, evenly from the sorted list."""
    utterances = sorted(utterances)
    if len(utterances) <= count:
        return list(utterances)
    return [utterances[i * len(utterances) // count] for i in range(count)]
