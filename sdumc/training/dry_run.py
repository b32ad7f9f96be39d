"""``train --dry-run``: whether settings are sound, without data."""

from __future__ import annotations

from argparse import Namespace

import torch

from sdumc.conditions import COMPLETE, MISSING, MODALITIES
from sdumc.losses.objective import sdumc_objective
from sdumc.model.network import SDUMC
from sdumc.training.settings import model_config, objective_weights

_DIM, _BATCH, _FRAMES = 8, 4, 3  # where the settings leave a dimension to the dump; and the size of the batch of noise


def dry_run(settings: Namespace) -> None:
    """Build the model, run one step on noise, print the number of parameters and the terms of the objective."""
    dims = {m: getattr(settings, f"{m}_dim") or _DIM for m in MODALITIES}
    model = SDUMC(model_config(Namespace(**{**vars(settings), **{f"{m}_dim": dim for m, dim in dims.items()}})))
    dims["text_sim"] = dims["text"]
    features = {name: torch.randn(_BATCH, _FRAMES, dim) for name, dim in dims.items()}
    lengths = {name: torch.full((_BATCH,), _FRAMES) for name in dims}
    flows = (COMPLETE, MISSING) if settings.flows == "both" else (COMPLETE,)
    outputs = {flow: out.loss_inputs() for flow, out in model(features, lengths, flows).items()}
    labels, has_text = torch.linspace(-1, 2, _BATCH), torch.ones(_BATCH, dtype=torch.bool)
    terms = sdumc_objective(outputs[COMPLETE], outputs.get(MISSING), labels, has_text, objective_weights(settings))
    terms["loss"].backward()
    print(f"settings are sound: {sum(p.numel() for p in model.parameters())} parameters, terms {', '.join(terms)}")
