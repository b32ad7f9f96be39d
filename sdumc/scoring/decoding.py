"""A trained model under a condition (which modalities, and which text, it is given): predictions, and attention.

Under the field's protocols of incomplete data too: fixed patterns, erased frames, lost modalities. ``docs/metrics.md``
gives definitions and sources. What is lost is decided by numbers that depend on the seed of the masks and on the
utterance alone, so all models and training seeds lose the same. They are stored beside the predictions. A number u is
drawn for each frame, or each modality of an utterance, and lost at every rate r > u: what is lost at a low rate is lost
at all higher ones, and curves are smooth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    TEXTS,
    condition_of,
    modality,
)
from sdumc.data.batches import Batch, BatchLoader, GlobalBatchSampler, UtteranceDataset, collate
from sdumc.data.dump import Dump, load_dump
from sdumc.errors import UserError
from sdumc.files import atomic_write, write_text
from sdumc.model.network import SDUMC
from sdumc.scale import CMU, MAPPED, LabelScale
from sdumc.scoring.attention import DRAWN, drawn_at_random
from sdumc.scoring.metrics import HEADER

# Frames in a batch at most. Decoding keeps no gradients, so this is more than in training: some 200 MB of features.
_BATCH_FRAMES = 50_000
# Utterances whose attention is kept: those with the largest errors of each run, so that the ones with the largest mean
# error over runs are among them.
WORST = 24
_ATTENTION_BATCH = 6


def inputs_for(
    condition: str, dump: Dump, available: Iterable[str] = MODALITIES, missing_text: str = SIMULATED
) -> dict[str, str]:
    """Dump features to read under a condition, by network input name.

    ``missing`` means the same as ``none`` where the dump has not the text that the missing flow reads
    (:func:`sdumc.conditions.condition_of`). A feature that all utterances of the
    dump lack is left out, and so is a modality that is not among the model's ``available`` ones.

    Raises:
        UserError: the dump lacks a feature that the condition is about, or has none of its modalities.
    """
    wanted = condition_of(condition, missing_text)
    present = {name for name, feature in dump.features.items() if feature.entries}  # not those absent throughout
    if wanted.required and wanted.required not in present:
        raise UserError(
            f"{dump.path / wanted.required}.scp: missing, but condition {condition} needs it; run stage 3, or decode "
            "another condition"
        )
    modalities = set(available)
    if wanted.required and "text" not in modalities:
        raise UserError(f"condition {condition} is about text, and the model was made without; decode another one")
    found = {n: f for n, f in wanted.inputs.items() if f in present and modality(f) in modalities}
    if not found:
        needed = ", ".join(wanted.features)
        raise UserError(f"{dump.path}: condition {condition} needs one of {needed}; the dump or the model has none")
    return found


@dataclass
class Decoded:
    """What a model computes for N utterances, in the order of ``ids``.

    Arrays as in :class:`sdumc.model.network.FlowOutput`, whose ``utterance`` is ``utterance_feature`` here.
    ``features`` names the dump features that the model was given.
    """

    ids: list[str]
    prediction: np.ndarray  # (N,)
    label: np.ndarray  # (N,) NaN where there is none
    utterance_feature: np.ndarray  # (N, e)
    text_feature: np.ndarray  # (N, d)
    modality_weights: np.ndarray  # (N, 3)
    query_weights: np.ndarray | None  # (N, 7)
    features: tuple[str, ...]
    scale: LabelScale = CMU  # of labels and predictions, that of the dump


def run_batch(model: SDUMC, batch: Batch, inputs: dict[str, str], flow: str, **options):
    """Score one batch, given as dump features, in one flow: a :class:`sdumc.model.network.FlowOutput`."""
    features = {name: batch.features[feature] for name, feature in inputs.items()}
    lengths = {name: batch.lengths[feature] for name, feature in inputs.items()}
    return model(features, lengths, flows=(flow,), **options)[flow]


def batches_of(
    dump: Dump, features: Iterable[str], batch_size: int, num_workers: int, share: tuple[int, int] = (0, 1)
) -> Iterator[Batch]:
    """The utterances of a set in order of falling length, or of the share (r, n) of it, each once; no empty batches."""
    dataset = UtteranceDataset(dump, sorted(features))
    rank, ranks = share
    sampler = GlobalBatchSampler(
        dataset.frames, batch_size * ranks, _BATCH_FRAMES * ranks, shuffle=False, world_size=ranks, rank=rank
    )
    return filter(len, BatchLoader(dataset, sampler, num_workers))


@torch.inference_mode()
def decode(
    model: SDUMC,
    dump: Dump,
    condition: str,
    device: torch.device | str = "cpu",
    share: tuple[int, int] = (0, 1),
    batch_size: int = 64,
    num_workers: int = 2,
) -> Decoded:
    """Score a set, each utterance once.

    Args:
        share: (r, n): only the r-th of n disjoint parts, so that n ranks together score the whole set.

    Returns:
        predictions on the dump's scale of labels, whatever corpus the model was trained on.

    Raises:
        UserError: see :func:`inputs_for` and :class:`sdumc.data.batches.UtteranceDataset`.
    """
    missing_text = model.config.missing_text
    inputs = inputs_for(condition, dump, model.available, missing_text)
    flow = condition_of(condition, missing_text).flow
    was_training = model.training
    model.eval()
    ids: list[str] = []
    parts: dict[str, list[torch.Tensor]] = {}
    for batch in batches_of(dump, inputs.values(), batch_size, num_workers, share):
        output = run_batch(model, batch.to(device), inputs, flow)
        ids += batch.ids
        for name, value in (
            ("prediction", output.prediction),
            ("label", batch.labels),
            ("utterance_feature", output.utterance),
            ("text_feature", output.text_feature),
            ("modality_weights", output.modality_weights),
            ("query_weights", output.query_weights),
        ):
            if value is not None:
                parts.setdefault(name, []).append(value.float().cpu())
    model.train(was_training)
    order = sorted(range(len(ids)), key=ids.__getitem__)
    arrays = {name: torch.cat(rows).numpy()[order] for name, rows in parts.items()}
    empty = np.zeros(0, np.float32)
    return Decoded(
        ids=[ids[i] for i in order],
        prediction=dump.scale.from_network(arrays.get("prediction", empty)),
        label=arrays.get("label", empty),
        utterance_feature=arrays.get("utterance_feature", empty),
        text_feature=arrays.get("text_feature", empty),
        modality_weights=arrays.get("modality_weights", empty),
        query_weights=arrays.get("query_weights"),
        features=tuple(sorted(inputs.values())),
        scale=dump.scale,
    )


def write_condition(
    condition: str, missing_text: str, features: Sequence[str], output_dir: Path, mapped: str = ""
) -> None:
    """Write condition.yaml: the condition, its flow, the dump features that the model read, and the scale of its train
    set where predictions are ``mapped`` from that one."""
    known = condition_of(condition, missing_text)
    text = next((f for f in features if f in TEXTS), None)
    content = {
        "condition": condition,
        "flow": known.flow,
        "features": list(features),
        "text": TEXTS[text] if text else "none",
    }
    if mapped:
        content[MAPPED] = mapped
    write_text(output_dir / "condition.yaml", yaml.safe_dump(content, sort_keys=False))


def write_decoded(decoded: Decoded, output_dir: Path) -> None:
    """Write predictions.tsv and, for figures, internals.npz. The predictions come last: when they exist, all does."""
    arrays = {
        name: getattr(decoded, name)
        for name in ("utterance_feature", "text_feature", "modality_weights", "query_weights")
        if getattr(decoded, name) is not None
    }
    with atomic_write(output_dir / "internals.npz", "wb") as f:
        np.savez(f, ids=np.array(decoded.ids), features=np.array(" ".join(decoded.features)), **arrays)
    write_predictions(decoded.ids, decoded.prediction, decoded.label, output_dir, decoded.scale)


def write_predictions(
    ids: Sequence[str], predictions: np.ndarray, labels: np.ndarray, output_dir: Path, scale: LabelScale = CMU
) -> None:
    """Write scale.yaml, and predictions.tsv: sorted ids, predictions (N,), labels (N,) with NaN where there is none."""
    scale.write(output_dir)
    with atomic_write(output_dir / "predictions.tsv") as f:
        f.write("\t".join(HEADER) + "\n")
        for utt, p, y in zip(ids, predictions, labels, strict=True):
            f.write(f"{utt}\t{p:.6f}\t{_label(y)}\n")


def mean_predictions(found: Sequence[Decoded]) -> np.ndarray:
    """The mean (N,) of what several models predict for the same utterances."""
    return np.stack([d.prediction for d in found]).mean(axis=0, dtype=np.float64)


def _label(y: float) -> str:
    return "" if np.isnan(y) else f"{y:.6g}"


def load_for(data_dir: Path, conditions: Iterable[str], missing_texts: Iterable[str] = (SIMULATED,)) -> Dump:
    """Load the features of a dump folder that any of the conditions reads, for models with these missing texts."""
    wanted = [condition_of(c, text) for c in conditions for text in missing_texts]
    return load_dump(data_dir, sorted({feature for c in wanted for feature in c.features}))


def check_dimensions(models: Mapping[str, SDUMC], dump: Dump) -> None:
    """Raise a :class:`UserError` where a feature of the dump is not as wide as what a model, by exp folder, reads."""
    for exp, model in models.items():
        for name, feature in dump.features.items():
            want = getattr(model.config, f"{modality(name)}_dim")
            if feature.entries and want and feature.dim != want:
                raise UserError(
                    f"{dump.path}/{name}.scp: dimension {feature.dim}, but {exp} reads {want}: other models made its "
                    "features; make them with the same for both, or give another model"
                )


def worth_keeping(decoded: Decoded, worst: int = WORST, drawn: int = DRAWN) -> list[str]:
    """The utterances with the largest absolute errors, and some drawn at random, labelled or not."""
    error = np.nan_to_num(np.abs(decoded.prediction - decoded.label), nan=-1.0)
    order = [int(i) for i in np.argsort(-error, kind="stable")[:worst] if error[i] >= 0]
    return sorted({decoded.ids[i] for i in order} | set(drawn_at_random(decoded.ids, drawn)))


@torch.inference_mode()
def attend(
    model: SDUMC, dump: Dump, condition: str, utterances: Sequence[str], device: torch.device | str = "cpu"
) -> dict[str, dict[str, np.ndarray]]:
    """Score ``utterances`` once more under ``condition``, and return the attention (7, T) by utterance and modality.

    A modality that the utterance does not have is left out; a model without cross-attention (``fusion: concat``) has
    none at all.

    Raises:
        UserError: as :func:`decode`.
    """
    if model.config.fusion != "umca":
        return {}
    missing_text = model.config.missing_text
    inputs = inputs_for(condition, dump, model.available, missing_text)
    flow = condition_of(condition, missing_text).flow
    dataset = UtteranceDataset(dump, sorted(inputs.values()))
    index = {utt: i for i, utt in enumerate(dump.utterances)}
    was_training = model.training
    model.eval()
    kept: dict[str, dict[str, np.ndarray]] = {}
    for start in range(0, len(utterances), _ATTENTION_BATCH):
        batch = collate([dataset[index[utt]] for utt in utterances[start : start + _ATTENTION_BATCH]]).to(device)
        found = run_batch(model, batch, inputs, flow, with_attention=True).attention
        for row, utt in enumerate(batch.ids):
            kept[utt] = {}
            for name, feature in inputs.items():
                frames = int(batch.lengths[feature][row])
                if frames:
                    m = modality(name)
                    kept[utt][m] = found[m][row, :, :frames].float().cpu().numpy()
    model.train(was_training)
    return kept


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
