#!/usr/bin/env python3
"""Make an exp folder of the authors' released checkpoint, which sdumc.bin.decode then uses like one trained here.

    tools/import_checkpoint.py RELEASED.pt exp/released

The public forward has the imagination (MIA) switched off and attends over padding; --imagination both and
--mask-padding true undo either. A prediction without padding masks depends on the batch, so decode such a folder with
--batch-size 1, or mask.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdumc.cli import Parser, run
from sdumc.errors import UserError


def get_parser() -> Parser:
    parser = Parser(__doc__ or "")
    parser.add_argument("checkpoint", metavar="RELEASED.pt", help="the released file: a torch dict with `state_dict`")
    parser.add_argument("exp_dir", metavar="EXP_DIR", help="folder to write; must not hold a model yet")
    g = parser.add_argument_group("behaviour")
    g.add_argument("--imagination", choices=("none", "both", "utterance", "content"), default="none")
    g.add_argument("--mask-padding", choices=("true", "false"), default="false")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    from sdumc.files import write_text
    from sdumc.model.network import SDUMC
    from sdumc.training.checkpoint import VALID_BEST, save_weights
    from sdumc.training.initial import import_released, read_released
    from sdumc.training.settings import get_parser as train_parser
    from sdumc.training.settings import write_config

    source, exp_dir = Path(args.checkpoint), Path(args.exp_dir)
    if (exp_dir / VALID_BEST).exists():
        raise UserError(f"{exp_dir / VALID_BEST}: exists; give another folder, or remove this one")
    released = read_released(source)
    try:
        config, state, left_out = import_released(released, args.imagination, args.mask_padding == "true")
    except UserError as e:
        raise UserError(f"{source}: {e}") from None
    model = SDUMC(config)
    wrong = [k for k, v in model.state_dict().items() if k not in state or state[k].shape != v.shape]
    if wrong:
        raise UserError(f"{source}: shapes that do not fit together: {', '.join(wrong[:3])}")

    save_weights(exp_dir / VALID_BEST, state)
    write_config(exp_dir, Namespace(**{**vars(train_parser().parse_args([])), **vars(config)}))
    write_text(
        exp_dir / "IMPORTED.txt",
        f"{source.name}: {len(released)} keys. Left out:\n" + "".join(f"  {k}\n" for k in left_out),
    )
    count = sum(v.numel() for v in state.values())
    print(f"{exp_dir}: {count} parameters in use; {len(left_out)} released keys left out (listed in IMPORTED.txt)")


if __name__ == "__main__":
    run(main)
