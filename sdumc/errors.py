"""The exception for errors that a user can correct, and the exit codes of all commands."""

from __future__ import annotations

EXIT_USER_ERROR = 1
EXIT_USAGE = 2  # argparse's own code for a wrong command line
EXIT_REQUEUE = 75  # EX_TEMPFAIL: state was saved on a signal; the same command continues


class UserError(Exception):
    """Wrong input, settings or environment that the user can correct.

    The message names the file and, if there is one, the utterance, and says what to do. Commands print it as
    ``error: ...`` without a traceback and exit with :data:`EXIT_USER_ERROR`.
    """
