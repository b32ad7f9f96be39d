"""One training step at the released dimensions: both flows, the objective, backward, Adam."""

from __future__ import annotations

from functools import partial

import torch

from sdumc.bench.measure import goal, interleaved, median, peak_memory, ratio, seconds, spread, table
from sdumc.bench.plain import PlainSDUMC, plain_objective
from sdumc.conditions import COMPLETE, MISSING, MODALITIES
from sdumc.hyperparameters import ModelConfig, ObjectiveWeights
from sdumc.losses.objective import sdumc_objective
from sdumc.machine import pick_device
from sdumc.model.network import SDUMC

BATCH = 96
RELEASED = ModelConfig(audio_dim=1024, text_dim=4096, video_dim=1024)
FRAMES = {"audio": (365, 1024), "text": (30, 4096), "text_sim": (30, 4096), "video": (220, 1024)}
VARIANTS = ("plain", "ours", "ours, bf16")


class Step:
    """A model, an optimiser and a fixed batch; calling it takes one training step."""

    def __init__(self, variant: str, compiled: bool = False, device: str | None = None):
        torch.manual_seed(0)
        self.device = pick_device(device or "auto")
        self.variant = variant
        self.x = {n: torch.randn(BATCH, *shape, device=self.device) for n, shape in FRAMES.items()}
        self.lengths = {n: torch.full((BATCH,), shape[0], device=self.device) for n, shape in FRAMES.items()}
        self.labels = (torch.randint(-9, 10, (BATCH,)) / 3).to(self.device)
        self.has_text = torch.ones(BATCH, dtype=torch.bool, device=self.device)
        model = PlainSDUMC(RELEASED) if variant == "plain" else SDUMC(RELEASED)
        self.model = model.to(self.device).train()
        self.network = torch.compile(self.model) if compiled else self.model
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=1e-4, weight_decay=1e-5, fused=True)

    def loss(self) -> torch.Tensor:
        if self.variant == "plain":
            x = {n: self.x[n] for n in MODALITIES}
            full = self.network(x, False)
            missing = self.network({**x, "text": self.x["text_sim"]}, True)
            return plain_objective(full, missing, self.labels)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled="bf16" in self.variant):
            out = self.network(self.x, self.lengths)
        full, missing = ({n: v.float() for n, v in out[f].loss_inputs().items()} for f in (COMPLETE, MISSING))
        return sdumc_objective(full, missing, self.labels, self.has_text, ObjectiveWeights())["loss"]

    def __call__(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimiser.step()


def run_once(variant: str | None) -> None:
    """What the memory of a variant is measured on; None builds the inputs alone."""
    step = Step(variant or "ours")
    if variant:
        step()
        step()


def main(repeats: int) -> bool:
    """Print step time, peak memory and parameters of each variant and the ceilings; whether the goals are reached."""
    steps = {variant: Step(variant) for variant in VARIANTS}
    if torch.cuda.is_available():
        steps["ours, bf16, compiled"] = Step("ours, bf16", compiled=True)
    times = interleaved(steps, repeats, warm_up=2)
    memory = {variant: peak_memory(partial(run_once, variant)) for variant in VARIANTS}
    inputs = sum(x.numel() for x in steps["ours"].x.values()) * 4 / 2**20
    rows = [
        [
            variant,
            f"{median(t):.3f}",
            spread(t),
            f"{ratio(times['plain'], t):.2f}",
            f"{memory[variant]:.0f}" if variant in memory else "-",
            str(sum(p.numel() for p in steps[variant].model.parameters())),
        ]
        for variant, t in times.items()
    ]
    header = ["step", "median (s)", "range (s)", "times as fast", "peak memory (MiB)", "parameters"]
    print(table(header, rows))
    print(f"\nBatch {BATCH}; the batch itself is {inputs:.0f} MiB of the memory of each.")
    _ceilings(median(times["ours"]))
    print()
    fast = goal("times as fast as plain", ratio(times["plain"], times["ours"]), least=2.5)
    # On a GPU keys are kept for the backward pass, and the batch itself is a large part of either.
    most = 0.8 if torch.cuda.is_available() else 0.5
    return goal("share of plain's memory", memory["ours"] / memory["plain"], most=most) and fast


def floating_point_operations() -> float:
    """Multiplications and additions of a step that no arrangement can avoid, forward and backward (three times)."""
    d, rows = RELEASED.dim, {n: BATCH * t for n, (t, _) in FRAMES.items()}
    projections = sum(2 * rows[n] * dim * d for n, (_, dim) in FRAMES.items())
    inner = sum(2 * 2 * r * d * d for r in rows.values())  # keys of pooling and of cross-attention
    # Features need no gradient: projections run forward and for weights, inner layers once more for their input.
    return 2 * projections + 3 * inner


def _ceilings(step_seconds: float) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(4096, 1024, device=device)
    b = torch.randn(1024, 256, device=device)
    product = min(seconds(partial(torch.mm, a, b)) for _ in range(20))
    c = torch.randn(2**25, device=device)
    e = torch.empty_like(c)
    copy = min(seconds(partial(e.copy_, c)) for _ in range(10))
    ceiling = 2 * 4096 * 1024 * 256 / product / 1e9
    achieved = floating_point_operations() / step_seconds / 1e9
    print(
        f"Ours in float32 does {achieved:.0f} GFLOP/s; a matrix product alone does {ceiling:.0f} GFLOP/s here, "
        f"a copy moves {2 * 4 * 2**25 / copy / 1e9:.1f} GB/s."
    )
