"""Attention of the seven queries over the frames of single utterances, for the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sdumc.conditions import condition_of, modality
from sdumc.data.dump import Dump
from sdumc.data.loader import UtteranceDataset, collate
from sdumc.model.network import SDUMC
from sdumc.scoring.attention_file import DRAWN, drawn_at_random
from sdumc.scoring.decoding import Decoded, inputs_for, run_batch

WORST = 24  # every run keeps these, so that the utterances with the largest mean error over runs are among them
_BATCH = 6


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
        UserError: as :func:`sdumc.scoring.decoding.decode`.
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
    for start in range(0, len(utterances), _BATCH):
        batch = collate([dataset[index[utt]] for utt in utterances[start : start + _BATCH]]).to(device)
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
