"""One Slurm of two nodes for all tests of this folder."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
from helpers.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if absent := missing():
        pytest.skip(f"Slurm is not installed (no {', '.join(absent)}); `tests/run.sh --with-slurm` installs it")
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("stopped by SIGTERM", 143))  # ends the cluster too
    cluster = Cluster()
    try:
        for attempt in range(3):
            try:
                cluster.start()
            except RuntimeError:
                # Between the choice of its ports and their use another process may have taken one.
                if attempt == 2:
                    raise
                cluster.stop()
                cluster = Cluster()
            else:
                break
        yield cluster
    finally:
        cluster.stop()
