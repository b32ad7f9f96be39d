"""Make the synthetic talking-face corpus of egs/mini from a seed: clips/<speaker>/<utt>.mp4 and corpus.tsv."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from sdumc.cli import Parser, run
from sdumc.errors import UserError


def get_parser() -> Parser:
    parser = Parser(__doc__)
    group = parser.add_argument_group("output")
    group.add_argument("--output-dir", required=True, help="corpus folder; it appears only when whole")
    group = parser.add_argument_group("size")
    for name, clips, speakers in (("pretrain", 400, 20), ("train", 600, 30), ("valid", 150, 10), ("test", 300, 20)):
        group.add_argument(f"--num-{name}", type=int, default=clips, help=f"clips of the {name} set")
        group.add_argument(f"--num-{name}-speakers", type=int, default=speakers, help=f"speakers of the {name} set")
    group = parser.add_argument_group("sound and picture")
    for prefix, least, most, of in (("", 0.12, 0.27, ""), ("pretrain-", 0.1, 0.22, ", in pretrain")):
        group.add_argument(f"--{prefix}noise-min", type=float, default=least, help=f"least noise, sd in full scale{of}")
        group.add_argument(f"--{prefix}noise-max", type=float, default=most, help=f"most noise, sd in full scale{of}")
    group.add_argument("--fps", type=float, default=10.0, help="video frames per second")
    group.add_argument("--frame-size", type=int, default=96, help="pixels, height and width, even")
    group = parser.add_argument_group("running")
    group.add_argument("--seed", type=int, default=1, help="the same seed gives the same corpus")
    group.add_argument("--jobs", type=int, default=0, help="processes; 0 = one per CPU; the bytes do not depend on it")
    return parser


def main(argv: Sequence[str] | None = None) -> int | None:
    args = get_parser().parse_args(argv)
    for prefix in ("", "pretrain-"):
        least, most = (getattr(args, f"{prefix}noise_{end}".replace("-", "_")) for end in ("min", "max"))
        if not 0 < least <= most < 1:
            raise UserError(f"--{prefix}noise-min and --{prefix}noise-max: 0 < min <= max < 1 is needed")
    if args.frame_size < 32 or args.frame_size % 2 or args.fps <= 0:
        raise UserError("--frame-size must be an even number from 32 up, --fps above 0")
    from mini import corpus, plan

    settings = plan.Settings(
        seed=args.seed,
        pretrain=args.num_pretrain,
        train=args.num_train,
        valid=args.num_valid,
        test=args.num_test,
        pretrain_speakers=args.num_pretrain_speakers,
        train_speakers=args.num_train_speakers,
        valid_speakers=args.num_valid_speakers,
        test_speakers=args.num_test_speakers,
        noise_min=args.noise_min,
        noise_max=args.noise_max,
        pretrain_noise_min=args.pretrain_noise_min,
        pretrain_noise_max=args.pretrain_noise_max,
        fps=args.fps,
        size=args.frame_size,
    )
    start = time.perf_counter()
    clips = corpus.make_corpus(settings, args.output_dir, args.jobs or len(os.sched_getaffinity(0)))
    print(f"{args.output_dir}: {len(clips)} clips in {time.perf_counter() - start:.0f} s")
    return None


if __name__ == "__main__":
    run(main)
