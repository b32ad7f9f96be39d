"""The field's protocols of incomplete data, from one trained model: fixed patterns, erased frames, lost modalities.

``docs/metrics.md`` gives definitions and sources. What is lost is decided by numbers that depend on the seed of the
masks and on the utterance alone, so all models and training seeds lose the same. They are stored beside the
predictions. A number u is drawn for each frame, or each modality of an utterance, and lost at every rate r > u: what is
lost at a low rate is lost at all higher ones, and curves are smooth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from sdumc.conditions import (
    CONDITIONS,
    MODALITIES,
    PATTERNS,
    PROTOCOL_CONDITIONS,
    PROTOCOL_RECORD,
    PROTOCOLS,
    SIMULATED,
    condition_of,
    modality,
)
from sdumc.data.batches import Batch
from sdumc.data.dump import Dump
from sdumc.errors import UserError
from sdumc.files import atomic_write, write_text
from sdumc.model.network import SDUMC
from sdumc.scoring.decoding import batches_of, inputs_for, run_batch, write_predictions

MASKS = "masks.npz"
_SCALE = 2**16  # numbers are drawn as 16 bits: u = draw / _SCALE


def draw(protocol: str, seed: int, utterance: str, name: str, count: int) -> np.ndarray:
    """``count`` even numbers from 0 to 65535 (count,) that depend on nothing but the arguments."""
    key = hashlib.blake2b("\t".join((protocol, str(seed), utterance, name)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(key, "little")).integers(_SCALE, size=count, dtype=np.uint16)


def is_lost(draws: np.ndarray, rate: float) -> np.ndarray:
    """Where numbers of :func:`draw` are lost at a rate from 0 to 1."""
    return draws < round(rate * _SCALE)


@dataclass
class Masks:
    """What each utterance loses, drawn when it is first asked for and kept to be stored."""

    protocol: str  # frames or modalities
    seed: int
    draws: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)  # by feature and utterance
    counts: dict[tuple[str, float], np.ndarray] = field(default_factory=dict)  # by condition and rate: lost, and of all

    def of(self, feature: str, utterance: str, count: int) -> np.ndarray:
        """The draws (count,) for an utterance's feature: one for each frame, or one for the modality."""
        key = (feature, utterance)
        if key not in self.draws:
            name = modality(feature)  # all kinds of text lose the same
            self.draws[key] = draw(self.protocol, self.seed, utterance, name, count)
        return self.draws[key]

    def count(self, condition: str, rate: float, lost: int, of: int) -> None:
        """Add to what is lost under a condition at a rate."""
        before = self.counts.get((condition, rate), np.zeros(2, np.int64))
        self.counts[condition, rate] = before + np.array([lost, of])

    def share(self, condition: str, rate: float) -> float:
        """The share that was lost."""
        lost, of = self.counts[condition, rate]
        return float(lost / of)

    def write(self, path: Path) -> None:
        """Store all draws: by feature ``<f>_ids`` (N,), ``<f>_counts`` (N,) and ``<f>``, their draws joined."""
        arrays: dict[str, Any] = {}
        for feature in sorted({f for f, _ in self.draws}):
            ids = sorted(utt for f, utt in self.draws if f == feature)
            rows = [self.draws[feature, utt] for utt in ids]
            arrays[f"{feature}_ids"], arrays[f"{feature}_counts"] = np.array(ids), np.array([len(r) for r in rows])
            arrays[feature] = np.concatenate(rows)
        with atomic_write(path, "wb") as f:
            np.savez(f, **arrays)


def erase_frames(
    batch: Batch,
    inputs: Mapping[str, str],
    rate: float,
    masks: Masks,
    condition: str,
    blanks: Mapping[str, torch.Tensor],
) -> Batch:
    """Replace each frame, with chance ``rate``, by its modality's blank (D,); lengths stay as they are."""
    features = dict(batch.features)
    for feature in inputs.values():
        lengths = batch.lengths[feature].tolist()
        mask = torch.zeros(features[feature].shape[:2], dtype=torch.bool)
        for row, (utt, length) in enumerate(zip(batch.ids, lengths, strict=True)):
            mask[row, :length] = torch.from_numpy(is_lost(masks.of(feature, utt, length), rate))
        masks.count(condition, rate, int(mask.sum()), sum(lengths))
        blank = blanks[modality(feature)].to(features[feature])
        features[feature] = torch.where(mask.unsqueeze(-1), blank, features[feature])
    return Batch(batch.ids, batch.labels, features, batch.lengths)


def lose_modalities(batch: Batch, inputs: Mapping[str, str], rate: float, masks: Masks, condition: str) -> Batch:
    """Take each modality away from an utterance with chance ``rate``, but not the last one that it has.

    The one with the highest number is kept. For three modalities, each is lost with chance r - r^3 / 3.
    """
    names = list(inputs.values())
    there = np.stack([batch.lengths[f].numpy() > 0 for f in names])
    draws = np.array([[int(masks.of(f, utt, 1)[0]) for utt in batch.ids] for f in names])
    last = np.where(there, draws, -1).argmax(axis=0)
    lost = is_lost(draws, rate) & there & (np.arange(len(names))[:, None] != last)
    masks.count(condition, rate, int(lost.sum()), int(there.sum()))
    lengths = {f: batch.lengths[f].masked_fill(torch.from_numpy(lost[i]), 0) for i, f in enumerate(names)}
    return Batch(batch.ids, batch.labels, batch.features, {**batch.lengths, **lengths})


def protocol_conditions(
    protocol: str, dump: Dump, available: Sequence[str], asked: Sequence[str] = (), missing_text: str = SIMULATED
) -> list[str]:
    """The conditions that a protocol is run for: those asked for, or all that the dump and the model allow.

    Raises:
        UserError: there is none.
    """
    has = {name for name, feature in dump.features.items() if feature.entries and modality(name) in available}
    if protocol == "patterns":
        found = [c for c in PATTERNS if set(CONDITIONS[c].features) <= has]
    else:  # without the missing flow's text, `missing` is no condition of its own
        known = [condition_of(c, missing_text) for c in PROTOCOL_CONDITIONS]
        found = list(asked) or [c.name for c in known if c.is_possible(has) and c.text in has]
        found = found or [c for c in ("none",) if CONDITIONS[c].is_possible(has)]
    if not found:
        raise UserError(
            f"{dump.path}: protocol {protocol} needs one of {', '.join(MODALITIES)}; dump or model has none"
        )
    return found


@torch.inference_mode()
def decode_protocol(
    models: Sequence[SDUMC],
    dump: Dump,
    protocol: str,
    conditions: Sequence[str],
    folder: Path,
    mask_seed: int = 1,
    batch_size: int = 64,
    num_workers: int = 2,
) -> None:
    """Write what the models predict, on average, into ``folder``, and last ``protocol.yaml``, which lists the rest.

    ``<condition>/predictions.tsv`` for patterns; ``<condition>/<rate>/predictions.tsv`` and ``masks.npz`` for the
    protocols that draw. Each utterance is read once for all rates.
    """
    (folder / PROTOCOL_RECORD).unlink(missing_ok=True)  # until all is written again
    masks = Masks(protocol, mask_seed)
    rates = PROTOCOLS[protocol].rates
    for condition in conditions:
        for rate, (ids, predictions, labels) in _decode(
            models, dump, condition, masks, batch_size, num_workers
        ).items():
            place = folder / condition / (f"{rate:.1f}" if rates else "")
            write_predictions(ids, dump.scale.from_network(predictions), labels, place, dump.scale)
    record: dict[str, Any] = {"protocol": protocol, "conditions": list(conditions)}
    if rates:
        masks.write(folder / MASKS)
        record |= {"mask_seed": mask_seed, "rates": list(rates)}
        record["lost"] = {c: [round(masks.share(c, r), 4) for r in rates] for c in conditions}
    write_text(folder / PROTOCOL_RECORD, yaml.safe_dump(record, sort_keys=False))


def _decode(
    models: Sequence[SDUMC], dump: Dump, condition: str, masks: Masks, batch_size: int, num_workers: int
) -> dict[float, tuple[list[str], np.ndarray, np.ndarray]]:
    """By rate (0 alone where nothing is drawn): sorted ids, mean predictions (N,) and labels (N,)."""
    missing_text = models[0].config.missing_text
    inputs = inputs_for(condition, dump, models[0].available, missing_text)
    flow = condition_of(condition, missing_text).flow
    rates = PROTOCOLS[masks.protocol].rates or (0.0,)
    ids: list[str] = []
    labels: list[torch.Tensor] = []
    found: dict[float, list[torch.Tensor]] = {rate: [] for rate in rates}
    device = next(models[0].parameters()).device
    for batch in batches_of(dump, inputs.values(), batch_size, num_workers):
        ids += batch.ids
        labels.append(batch.labels.clone())
        for rate in rates:
            outputs = []
            for model in models:
                model.eval()
                given = batch
                if masks.protocol == "frames":
                    given = erase_frames(batch, inputs, rate, masks, condition, blanks(model))
                elif masks.protocol == "modalities":
                    given = lose_modalities(batch, inputs, rate, masks, condition)
                outputs.append(run_batch(model, given.to(device), inputs, flow).prediction.double().cpu())
            found[rate].append(torch.stack(outputs).mean(dim=0))
    order = sorted(range(len(ids)), key=ids.__getitem__)
    y = torch.cat(labels).numpy()[order]
    return {rate: ([ids[i] for i in order], torch.cat(p).numpy()[order], y) for rate, p in found.items()}


def blanks(model: SDUMC) -> dict[str, torch.Tensor]:
    """What stands for an erased frame, by modality: zeros (D,), and for text the mean state of the train set (D,).

    A text's hidden states have no [UNK]. Their mean is a state that says nothing about the word; zero would be far from
    any that the language model writes. A model without normalised features does not know the mean: zero.
    """
    found = {}
    for m in model.available:
        mean: torch.Tensor = model.frame_projection[m].mean  # type: ignore[assignment]
        found[m] = mean.cpu() if m == "text" else torch.zeros_like(mean, device="cpu")
    return found
