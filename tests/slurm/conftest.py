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
    cluster = Cluster()
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("stopped by SIGTERM", 143))  # ends the cluster too
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
