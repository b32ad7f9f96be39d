"""A `python3` for recipes whose commands are forked from one process that has imported torch and transformers already.

Of a tiny recipe's time nine tenths are the seconds that each of its thirty commands takes to import them. The package
itself is not among what is imported: every command reads its code as it stands. tests/integration/test_mini.py runs a
recipe with a Python of its own for every command.

    warm.py SOCKET WORD...    what `python3 WORD...` in a recipe becomes
    warm.py --serve SOCKET    the process that forks
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

SHIM = """#!/bin/sh
case "$1 $2" in
"-m sdumc.bin."* | */several.py*) exec {python} -S -E {here} {socket} "$@" ;;
*) exec {python} "$@" ;;
esac
"""


@contextlib.contextmanager
def warm_python(folder: Path) -> Iterator[dict[str, str]]:
    """Start the process; gives the environment variables with which recipes use it."""
    address = folder / "socket"
    shim = folder / "bin/python3"
    shim.parent.mkdir()
    shim.write_text(SHIM.format(python=sys.executable, here=Path(__file__).resolve(), socket=address))
    shim.chmod(0o755)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
    command = [sys.executable, __file__, "--serve", str(address)]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None and server.stdout.readline() == b"ready\n"
        # path.sh takes the python3 on the path where there is an environment.
        yield {"PATH": f"{shim.parent}:{os.environ['PATH']}", "VIRTUAL_ENV": sys.prefix}
    finally:
        server.terminate()
        server.wait()


def call(address: str, words: list[str]) -> int:
    """Have the process run a command with this one's folder, environment and streams; returns its exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        given = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(connection, [len(given).to_bytes(8, "little")], [0, 1, 2])
        connection.sendall(given)
        return int(connection.recv(8) or b"1")


def serve(address: str) -> None:
    """Fork a process for each call. It is killed when its caller ends before it."""
    import_all()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen(64)
    print("ready", flush=True)
    calls: dict[int, tuple[int, socket.socket]] = {}  # process number and caller, by the process's descriptor
    while True:
        callers = {connection: pid for pid, connection in calls.values()}
        for ready in select.select([listening, *calls, *callers], [], [])[0]:
            if ready is listening:
                connection = listening.accept()[0]
                pid = start(connection, listening)
                calls[os.pidfd_open(pid)] = (pid, connection)
            elif ready in calls:
                pid, connection = calls.pop(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(OSError):
                    connection.sendall(str(code if code >= 0 else 128 - code).encode())
                connection.close()
                os.close(ready)
            elif ready in callers:  # a caller says nothing more, so it has ended
                with contextlib.suppress(ProcessLookupError):
                    os.kill(callers[ready], signal.SIGKILL)


def import_all() -> None:
    """What the commands of recipes import, but for the package itself."""
    for name in (
        "torch._dynamo",
        "safetensors.torch",
        "matplotlib.pyplot",
        "scipy.stats",
        "configargparse",
        "av",
        "PIL",
    ):
        importlib.import_module(name)
    transformers = importlib.import_module("transformers")
    for name in ("AutoModel", "AutoModelForCTC", "AutoTokenizer", "AutoFeatureExtractor", "AutoImageProcessor"):
        getattr(transformers, name)
    for name in ("LlamaForCausalLM", "WavLMForCTC", "WhisperForConditionalGeneration", "ViTModel", "CLIPVisionModel"):
        getattr(transformers, name)


def start(connection: socket.socket, listening: socket.socket) -> int:
    """Fork; the child becomes the command of the caller."""
    size, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
    given = b""
    while len(given) < int.from_bytes(size, "little"):
        given += connection.recv(1 << 20)
    if pid := os.fork():
        for descriptor in descriptors:
            os.close(descriptor)
        return pid
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    listening.close()
    connection.close()
    words, folder, environment = json.loads(given)
    os._exit(become(words, folder, environment))


def become(words: list[str], folder: str, environment: dict[str, str]) -> int:
    """Run `python3 WORD...` here; returns the exit code."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    paths = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.path[:1] = [folder, *paths]
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    else:
        sys.exit(call(sys.argv[1], sys.argv[2:]))
