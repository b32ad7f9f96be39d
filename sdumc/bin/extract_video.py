"""Stage 3: video features, one vector per picture of the whole frame or of the tracked face, for one shard."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sdumc.cli import Parser, add_job_options, run, setup_logging

log = logging.getLogger("sdumc")


def get_parser() -> Parser:
    parser = Parser(
        "Write one vector per picture from a vision model (ViT, CLIP, DINOv2, SigLIP, ...) for a shard of a data "
        "directory;\n`sdumc.bin.finish_dump --name video` then joins the shards. Clips without video or without a face "
        "are listed as absent."
    )
    add_job_options(parser, "video")
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, metavar="DIR", help="vision model: a transformers folder")
    group.add_argument("--pooling", choices=("pooler", "cls", "mean"), default="cls", help="what of its output is kept")
    group.add_argument("--picture-batch", type=int, default=64, metavar="N", help="pictures in one pass of the model")
    group = parser.add_argument_group("pictures")
    group.add_argument("--fps", type=float, default=5.0, help="pictures per second, chosen by time stamp")
    group.add_argument(
        "--detector",
        choices=("none", "yunet", "opencv"),
        default="none",
        help="none: the whole picture; yunet: the face; opencv: the same, by the name that it had",
    )
    group.add_argument("--face-margin", type=float, default=1.3, help="size of the square cut out, in face widths")
    group.add_argument(
        "--min-face", type=float, default=0.05, help="a clip with a face in fewer of its pictures (0-1) is absent"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logging(args.verbose)
    from sdumc.errors import UserError
    from sdumc.extraction.faces import FaceDetector
    from sdumc.extraction.features import PictureReader, extract_video
    from sdumc.extraction.loop import data_hash, load_job, open_shard
    from sdumc.machine import pick_device
    from sdumc.pretrained.loading import DTYPES, fingerprint
    from sdumc.pretrained.vision import VisionExtractor

    if args.detector == "opencv":
        log.warning("--detector opencv: OpenCV's cascade is no longer used; faces are found by yunet")
        args.detector = "yunet"
    if args.fps <= 0 or args.picture_batch < 1 or args.face_margin <= 0:
        raise UserError("--fps, --picture-batch and --face-margin must be positive")
    data, utterances = load_job(args)
    device = pick_device(args.device)
    extractor = VisionExtractor(args.model, DTYPES[args.dtype], device, args.pooling, args.picture_batch)
    settings = {
        "extractor": "video",
        "model": args.model,
        "model_hash": fingerprint(extractor.folder),
        "pooling": args.pooling,
        "frame_rate": args.fps,
        "dim": extractor.dim,  # so that it is known even if no clip has a face
        "detector": args.detector,
        "face_margin": args.face_margin,
        "min_face": args.min_face,
        "dtype": args.dtype,
        "data_hash": data_hash(data),
    }
    detector = FaceDetector() if args.detector == "yunet" else None
    reader = PictureReader(args.fps, detector, args.face_margin, args.min_face)
    with open_shard(args, settings, utterances) as writer:
        extract_video(data, utterances, extractor, reader, writer, args.bad_media)


if __name__ == "__main__":
    run(main)
