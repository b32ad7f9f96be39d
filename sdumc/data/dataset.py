"""Utterances and padded batches. :mod:`sdumc.data.loader` makes the same batches faster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sdumc.data.ark import all_finite, load_matrix
from sdumc.data.dump import Dump
from sdumc.errors import UserError


@dataclass
class Utterance:
    """One utterance: features (T, D) by name, None where the modality is absent; ``dims`` gives D also for those.

    ``label`` is NaN for a set without labels.
    """

    id: str
    label: float
    features: dict[str, torch.Tensor | None]
    dims: dict[str, int] = field(default_factory=dict)


@dataclass
class Batch:
    """Utterances padded to a common length.

    Attributes:
        ids: B utterance ids.
        labels: (B,) float32, NaN without labels.
        features: by name (B, T, D) float32, T at least 1; zero beyond ``lengths``.
        lengths: by name (B,) int64 frames; 0 where the modality is absent.
    """

    ids: list[str]
    labels: torch.Tensor
    features: dict[str, torch.Tensor]
    lengths: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on ``device``; with ``non_blocking`` the copy may still run when this returns."""
        return Batch(
            ids=self.ids,
            labels=self.labels.to(device, non_blocking=non_blocking),
            features={name: x.to(device, non_blocking=non_blocking) for name, x in self.features.items()},
            lengths={name: x.to(device, non_blocking=non_blocking) for name, x in self.lengths.items()},
        )


class UtteranceDataset:
    """The utterances of a dump folder, in the order of ``dump.utterances``; matrices are read when asked for.

    Args:
        dump: a loaded dump folder.
        names: the features to read.

    Raises:
        UserError: the dump has no such feature. When reading: an archive is cut short, or a matrix has NaN or infinite
            values, another dimension than the feature, or another length than its ``.frames`` file states.
    """

    def __init__(self, dump: Dump, names: Sequence[str]):
        for name in names:
            if name not in dump.features:
                raise UserError(f"{dump.path / f'{name}.scp'}: missing, but needed; run the stage that makes it")
        self.dump = dump
        self.names = tuple(names)
        self.dims = {name: dump.features[name].dim for name in self.names}

    def __len__(self) -> int:
        return len(self.dump.utterances)

    @property
    def frames(self) -> list[int]:
        """Frames of each utterance, summed over the features read: what a sampler needs."""
        tables = [self.dump.features[name].frames for name in self.names]
        return [sum(table.get(utt, 0) for table in tables) for utt in self.dump.utterances]

    def __getitem__(self, index: int) -> Utterance:
        utt = self.dump.utterances[index]
        return Utterance(
            id=utt,
            label=self.dump.labels.get(utt, math.nan),
            features={name: self.read(name, utt) for name in self.names},
            dims=self.dims,
        )

    def read(self, name: str, utt: str) -> torch.Tensor | None:
        """One feature (T, D) of an utterance, checked; None where it is absent."""
        feature = self.dump.features[name]
        if utt not in feature.entries:
            return None
        where = f"{self.dump.path / f'{name}.scp'}: utterance {utt!r}"
        try:
            matrix = load_matrix(feature.entries[utt])
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
        where += f" in {feature.entries[utt]}"
        if matrix.shape[1] != feature.dim:
            raise UserError(
                f"{where}: dimension {matrix.shape[1]}, but the feature has {feature.dim}; make the feature again"
            )
        if matrix.shape[0] != feature.frames[utt]:
            raise UserError(
                f"{where}: {matrix.shape[0]} frames, but {self.dump.path / f'{name}.frames'} states "
                f"{feature.frames[utt]}; make the feature again"
            )
        if not all_finite(matrix):
            raise UserError(
                f"{where}: NaN or infinite values; make the feature again, or list the utterance in {name}.absent"
            )
        return torch.from_numpy(matrix)


def collate(utterances: list[Utterance]) -> Batch:
    """Pad utterances to a :class:`Batch`.

    An empty list (a rank that has no share of a small global batch) gives a batch of length 0 without features.
    """
    if not utterances:
        return Batch(ids=[], labels=torch.zeros(0), features={}, lengths={})
    features, lengths = {}, {}
    for name in utterances[0].features:
        values = [u.features[name] for u in utterances]
        lengths[name] = torch.tensor([0 if v is None else len(v) for v in values], dtype=torch.int64)
        dim = next((v.shape[1] for v in values if v is not None), None)
        if dim is None:
            dim = utterances[0].dims[name]
        padded = torch.zeros(len(values), max(1, int(lengths[name].max())), dim)
        for row, value in zip(padded, values, strict=True):
            if value is not None:
                row[: len(value)] = value
        features[name] = padded
    return Batch(
        ids=[u.id for u in utterances],
        labels=torch.tensor([u.label for u in utterances], dtype=torch.float32),
        features=features,
        lengths=lengths,
    )
