"""The exception for errors that a user can correct, and the exit codes of all commands."""

from __future__ import annotations

import sys
from collections.abc import Callable

EXIT_USER_ERROR = 1
EXIT_USAGE = 2  # argparse's own code for a wrong command line
EXIT_REQUEUE = 75  # EX_TEMPFAIL: state was saved on a signal; the same command continues


class UserError(Exception):
    """Wrong input, settings or environment that the user can correct.

    The message names the file and, if there is one, the utterance, and says what to do. Commands print it as
    ``error: ...`` without a traceback and exit with :data:`EXIT_USER_ERROR`.
    """


def answer_shell(answer: Callable[[list[str]], bool], usage: str) -> int:
    """Let ``answer`` print what a shell script asks for on the command line; returns the exit code.

    ``answer`` returns False if it does not understand the words of the command line.
    """
    try:
        if answer(sys.argv[1:]):
            return 0
        print(usage, file=sys.stderr)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
    return EXIT_USAGE
