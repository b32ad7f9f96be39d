"""What all Python tests share."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.shared import MEDIA
from helpers.warm import warm_python
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works also without an installed sdumc
import sdumc  # noqa: E402, F401 (before torch: it says how threads wait)

# Before torch or transformers are imported: nothing is ever downloaded, and small tests do not fight over the cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
# Their commands remember nothing in the tester's home (see sdumc.files.remember).
if "SDUMC_CACHE" not in os.environ:
    os.environ["SDUMC_CACHE"] = tempfile.mkdtemp(prefix="sdumc-cache-")
    atexit.register(shutil.rmtree, os.environ["SDUMC_CACHE"], ignore_errors=True)
# Called within a job of Slurm or by torchrun, the tests' own trainings are no ranks of it.
for name in [n for n in os.environ if n.startswith(("SLURM_", "SBATCH_", "SRUN_", "TORCHELASTIC_"))]:
    del os.environ[name]
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)

# The same examples every day, and as many seconds for each as a busy machine needs.
settings.register_profile("sdumc", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("sdumc")


def refuse_deprecations() -> None:
    """What transformers logs of deprecated arguments is an error, like Python's warnings by `filterwarnings`."""
    warn = logging.Logger.warning

    def checked(self: logging.Logger, message: object, *args, stacklevel: int = 1, **more) -> None:
        among_themselves = "suppress_tokens" in str(message)  # Whisper's generate to that of all models
        if self.name.startswith("transformers") and "deprecated" in str(message) and not among_themselves:
            raise DeprecationWarning(str(message) % args if args else str(message))
        warn(self, message, *args, stacklevel=stacklevel + 1, **more)

    logging.Logger.warning = checked


refuse_deprecations()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--strict-skips", action="store_true", help="fail when a skip's reason is not an allowed one")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--strict-skips") and not hasattr(config, "workerinput"):  # not in a process of pytest-xdist
        config.pluginmanager.register(StrictSkips())


class StrictSkips:
    """The run fails when a test was skipped for a reason that begins as no line of ``allowed_skips.txt``."""

    def __init__(self) -> None:
        lines = (ROOT / "tests" / "allowed_skips.txt").read_text().splitlines()
        self.allowed = tuple(line for line in lines if line and not line.startswith("#"))
        self.wrong: list[str] = []

    def pytest_runtest_logreport(self, report) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if not reason.startswith(self.allowed):
                self.wrong.append(f"{report.nodeid}: {reason}")

    pytest_collectreport = pytest_runtest_logreport

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.wrong and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        if self.wrong:
            terminalreporter.section("skipped for a reason that is not in tests/allowed_skips.txt", red=True)
            for line in self.wrong:
                terminalreporter.line(line)


@pytest.fixture(autouse=True)
def commands_leave_no_traces() -> Iterator[None]:
    """Commands called in this process set up logging and signals for themselves; the next test starts without."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGPIPE)}
    yield
    for name, level in (("root", logging.WARNING), ("sdumc", logging.NOTSET)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers[:] = [h for h in logger.handlers if type(h).__module__.startswith("_pytest.")]
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def media_dir() -> Path:
    """A folder of real recordings (MPEG video with sound), where the tester has one."""
    if not MEDIA.is_dir():
        pytest.skip(f"no real recordings: no folder {MEDIA}")
    return MEDIA


@pytest.fixture(scope="session")
def _warm(tmp_path_factory) -> Iterator[dict[str, str]]:
    with warm_python(tmp_path_factory.mktemp("warm")) as environment:
        yield environment


@pytest.fixture
def warm(_warm, monkeypatch) -> None:
    """Recipes' commands need not import torch again: :mod:`helpers.warm`."""
    for name, value in _warm.items():
        monkeypatch.setenv(name, value)
