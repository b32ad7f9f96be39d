"""Train SDUMC. One process per rank; start several with utils/ranks.py, torchrun or srun.

The run itself is :func:`sdumc.training.run.train`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from sdumc.cli import run
from sdumc.errors import UserError
from sdumc.machine import StopSignal, die_with
from sdumc.training.settings import get_parser


def main(argv: Sequence[str] | None = None) -> int:
    settings = get_parser().parse_args(argv)
    stop = StopSignal(
        signal.SIGTERM, signal.SIGUSR1
    )  # before torch is imported: a signal must not end it while it starts
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's agent leaves its ranks behind when it is killed
        die_with(os.getppid())
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, and is then deterministic
    if settings.dry_run:
        from sdumc.training.run import dry_run

        dry_run(settings)
        return 0
    for name in ("train_dir", "valid_dir", "exp_dir"):
        if not getattr(settings, name):
            raise UserError(f"--{name.replace('_', '-')} is not given")
    from sdumc.training.run import train

    return train(settings, stop)


if __name__ == "__main__":
    run(main)
