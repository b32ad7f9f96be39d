"""A page on this machine on which clips are dropped and scored."""

from __future__ import annotations

import importlib.util
import signal
import sys
from collections.abc import Sequence

from sdumc.cli import Parser, add_model_options, at_least, has_own_process, run, setup_logging
from sdumc.errors import UserError
from sdumc.machine import add_device_option


def get_parser() -> Parser:
    parser = Parser(
        "A page on this machine (http://127.0.0.1) on which you drop a clip, and that shows its score as\n"
        "`sdumc predict --html` does. It cannot be reached from other machines and asks for nothing from the\n"
        "network. Needs the extra `demo`: tools/setup_env.sh --extras demo, or pip install starlette uvicorn."
    )
    group = parser.add_argument_group("model")
    add_model_options(group)
    group = parser.add_argument_group("server")
    group.add_argument("--port", type=at_least(0, int), default=8765, metavar="N", help="0: any that is free")
    group.add_argument("--max-megabytes", type=at_least(0), default=200.0, metavar="N", help="largest clip")
    group.add_argument("--max-length", type=at_least(0), default=600.0, metavar="S", help="longest clip, in seconds")
    group = parser.add_argument_group("utterances")
    group.add_argument("--max-seconds", type=at_least(1), default=20.0, metavar="S", help="longest utterance")
    group = parser.add_argument_group("computing")
    add_device_option(group)
    group.add_argument(
        "--batch-size", type=at_least(1, int), default=8, metavar="N", help="utterances at once, at most"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    setup_logging(args.verbose)
    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"sdumc demo needs {' and '.join(missing)}: run tools/setup_env.sh --extras demo, or pip install "
            f"{' '.join(missing)}"
        )
    from sdumc.prediction.startup import start_fast

    if has_own_process():
        start_fast()
    from sdumc.prediction.demo import HOST, Jobs, Limits, listen, make_app, make_server, workplace
    from sdumc.prediction.scorer import Scorer

    socket = listen(args.port)
    scorer = Scorer.load(args.exp_dir, device=args.device, model_dir=args.model_dir, batch_size=args.batch_size)
    # uvicorn stops by itself at a signal, and raises it again: the folder of the clips must be removed all the same.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    with workplace() as folder:
        jobs = Jobs(
            lambda path, text, progress: scorer.score(path, text, max_seconds=args.max_seconds, progress=progress),
            folder,
            Limits(args.max_megabytes, args.max_length),
        )
        app = make_app(jobs, f"Model: {args.exp_dir}" + "".join(f"; {note}" for note in scorer.notes))
        print(f"http://{HOST}:{socket.getsockname()[1]}   (stop with Ctrl-C)", flush=True)
        make_server(app).run(sockets=[socket])
    return 0


if __name__ == "__main__":
    run(main)
