"""The one exception that means "the user can mend this", and the exit codes every command shares."""

from __future__ import annotations

EXIT_USER_ERROR = 1
EXIT_USAGE = 2  # argparse's own code for a wrong command line
EXIT_REQUEUE = 75  # EX_TEMPFAIL: state was saved on a signal; run the same command again to go on


class UserError(Exception):
    """Wrong input, setting or environment that the user can mend.

    The message names the file and, where there is one, the utterance, and says what to do. Commands print it
    as ``error: ...`` without a traceback and exit with :data:`EXIT_USER_ERROR`.
    """

    def __init__(self, message: object = ""):
        # A DataLoader raises a worker's error again with the worker's traceback as text in front: keep the message.
        text = str(message)
        if text.startswith("Caught UserError in DataLoader worker"):
            text = text.rpartition("sdumc.errors.UserError: ")[2].strip()
        super().__init__(text)
