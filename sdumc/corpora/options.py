"""Options that the importers of stage 1 share."""

from __future__ import annotations

from typing import Any

from sdumc.cli import Parser
from sdumc.corpora.sets import KNOWN_COUNTS


def add_media_options(group: Any, required: bool = False) -> None:
    """``--corpus-dir`` and ``--media``: where the films of a raw distribution are, and how they are cut."""
    note = "" if required else ", if there are media of the same clips"
    group.add_argument(
        "--corpus-dir", required=required, metavar="DIR", help=f"the folder that holds Raw/, or Raw itself{note}"
    )
    group.add_argument(
        "--media",
        choices=("auto", "full", "segmented"),
        default="auto",
        help="cut clips from whole videos, or take the files of single clips; auto: the first where there are any",
    )


def add_output_options(parser: Parser, dump: bool = True) -> Any:
    """Where the sets go, how many of their utterances may be left out, and which counts stand beside those found.

    Args:
        dump: there are features to write too.

    Returns:
        the group, for more options.
    """
    group = parser.add_argument_group("output")
    what = "texts and labels" if dump else "the sets"
    group.add_argument("--data-dir", default="data", metavar="DIR", help=f"where {what} are written")
    if dump:
        group.add_argument("--dump-dir", default="dump", metavar="DIR", help="where the features are written")
    group.add_argument(
        "--max-drop", type=float, default=0.01, metavar="X", help="largest share of a fold that is left out (0-1)"
    )
    group.add_argument(
        "--counts", choices=tuple(KNOWN_COUNTS), default="mosei", help="published counts to show beside those found"
    )
    return group
