"""Score video or audio files with a trained model: a number for each utterance and for the whole file."""

from __future__ import annotations

import json
import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdumc.cli import Parser, add_checkpoint_option, add_model_options, has_own_process, run, setup_logging
from sdumc.errors import EXIT_USER_ERROR, UserError
from sdumc.machine import add_device_option
from sdumc.scale import CMU

if TYPE_CHECKING:
    from sdumc.prediction.clip_page import PageWriter

log = logging.getLogger("sdumc")


def get_parser() -> Parser:
    parser = Parser(
        "Score your own clips on the scale of the model's corpus, such as -3 (very negative) to 3 (very positive). No\n"
        "transcript is needed: text is simulated from the sound, or recognised, as for the model's training. Long\n"
        "files are cut into utterances where nobody speaks; the overall score is the mean of their scores weighted\n"
        "by duration. When a file fails, the others are still scored, and the exit code is 1."
    )
    group = parser.add_argument_group("model")
    add_model_options(group)
    add_checkpoint_option(group)
    group = parser.add_argument_group("files")
    group.add_argument("files", nargs="*", metavar="FILE", help="video or audio files, or folders of them")
    group.add_argument("--list", metavar="FILE", help="a text file with one such name per line")
    group.add_argument(
        "--text",
        metavar="TEXT",
        help="the transcript: words, a text file, subtitles (.srt, .vtt, .ass, ...), whose times give the utterances, "
        "or a table of lines `name words`, with the name of the file without its extension (with several files: this)",
    )
    group.add_argument(
        "--bad-media",
        choices=("stop", "absent"),
        default="stop",
        help="when a sound or picture track cannot be read: the file fails, or the track counts as absent (noted)",
    )
    group = parser.add_argument_group("utterances")
    group.add_argument(
        "--cut", choices=("auto", "yes", "no"), default="auto", help="auto: cut files longer than --max-seconds"
    )
    group.add_argument("--max-seconds", type=float, default=20.0, metavar="S", help="longest utterance when cutting")
    group = parser.add_argument_group("output")
    group.add_argument("--json", action="store_true", help="print JSON instead of tables")
    group.add_argument(
        "--subtitles", choices=("srt", "vtt"), help="also write subtitles with score and words, CLIP.sdumc.srt or .vtt"
    )
    group.add_argument("--output-dir", metavar="DIR", help="folder for the subtitles; default: that of the file")
    group.add_argument(
        "--html",
        metavar="FILE|DIR",
        help="also write a page with player, course of sentiment, transcript and attention: FILE.html for all files, "
        "or a folder, with a page for each and index.html",
    )
    group = parser.add_argument_group("computing")
    add_device_option(group)
    group.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="number format of the extractors; default: the train set's",
    )
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="utterances at once, at most")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    setup_logging(args.verbose)
    if not args.verbose:
        log.setLevel(logging.WARNING)
    if args.batch_size < 1:
        raise UserError("--batch-size must be at least 1")
    from sdumc.data import worker
    from sdumc.prediction.inputs import media_files, transcripts

    files, failures = media_files(args.files, args.list)
    if files:
        worker.start_early()  # while torch is loaded
    texts = transcripts(args.text, files)
    results: list[dict] = []
    pages = None
    if args.html:
        from sdumc.prediction.clip_page import PageWriter

        pages = PageWriter(args.html)
    for path, reason in failures:
        _report_failure(path, reason, results, pages)
    ends = _score(args, files, texts, results, pages) if files else CMU.as_dict()
    if pages is not None:
        pages.close()
    if args.json:
        from sdumc.files import json_ready

        files_alone = [{k: v for k, v in r.items() if k != "scale"} for r in results]  # it is that of all
        document = {"model": args.exp_dir, "scale": [ends["low"], ends["high"]], "files": files_alone}
        print(json.dumps(json_ready(document), indent=2, ensure_ascii=False))
    return EXIT_USER_ERROR if any("error" in r for r in results) else 0


def _score(args: Namespace, files: Sequence[Path], texts: dict, results: list[dict], pages: PageWriter | None) -> dict:
    """Score the files and add what comes of each to ``results``; returns the scale of the scores."""
    from tqdm import tqdm

    from sdumc.files import shown
    from sdumc.prediction.startup import start_fast

    if has_own_process():
        start_fast()
    from sdumc.prediction.scorer import Scorer, table, write_subtitles

    scorer = Scorer.load(
        args.exp_dir,
        checkpoint=args.checkpoint,
        device=args.device,
        dtype=args.dtype,
        model_dir=args.model_dir,
        batch_size=args.batch_size,
    )
    for note in scorer.notes:
        log.warning("%s", note)
    bar_format = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    # disable=None: no progress bar unless stderr is a terminal.
    with tqdm(
        total=len(files), bar_format=bar_format, mininterval=0, leave=False, disable=None, file=sys.stderr
    ) as bar:
        for number, path in enumerate(files):
            bar.set_description(shown(path.name))

            def progress(done: int, total: int, number: int = number) -> None:
                if total > 1:
                    bar.set_postfix_str(f"utterance {done} of {total}", refresh=False)
                bar.update(number + done / total - bar.n)

            try:
                scored = scorer.score(
                    path,
                    texts.get(path),
                    cut=args.cut,
                    max_seconds=args.max_seconds,
                    bad_media=args.bad_media,
                    progress=progress,
                )
                bar.clear()
                if not args.json:
                    print(table(scored), end="\n\n" if len(files) > 1 else "\n", flush=True)
                results.append(scored.as_dict())
                if args.subtitles:
                    write_subtitles(scored, args.subtitles, Path(args.output_dir) if args.output_dir else None)
                if pages is not None:
                    pages.add(scored)
            except UserError as e:
                bar.clear()
                if results and results[-1].get("file") == shown(path):
                    results.pop()
                _report_failure(str(path), str(e), results, pages)
            bar.set_postfix_str("", refresh=False)
            bar.update(number + 1 - bar.n)
    return scorer.scale.as_dict()


def _report_failure(path: str, reason: str, results: list[dict], pages: PageWriter | None) -> None:
    from sdumc.files import shown

    path, reason = shown(path), shown(reason)
    message = reason if path in reason else f"{path}: {reason}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    results.append({"file": path, "error": reason})
    if pages is not None:
        pages.fail(path, reason)


if __name__ == "__main__":
    run(main)
