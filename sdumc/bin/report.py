"""Write RESULTS.md, the figures and report.html from one or more trained and decoded runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from sdumc.cli import Parser, run, setup_logging

log = logging.getLogger(__name__)


def get_parser() -> Parser:
    parser = Parser(
        "Report on runs that differ in their seed: RESULTS.md with mean and spread, baselines and checks; figures in\n"
        "OUTPUT_DIR/images and, with the mean curves, in OUTPUT_DIR/tensorboard; and OUTPUT_DIR/report.html, one page\n"
        "that needs no server.\n"
        "The same inputs give the same files."
    )
    group = parser.add_argument_group("what to report on")
    group.add_argument("--exp-dirs", nargs="+", required=True, metavar="DIR", help="experiment folders, one per seed")
    group.add_argument("--train-set", metavar="SET", help="set they were trained on; as recorded by default")
    group.add_argument("--valid-set", metavar="SET", help="set that chose the epoch; as recorded by default")
    group.add_argument("--test-sets", nargs="+", default=["test"], metavar="SET", help="decoded sets, a table for each")
    group.add_argument("--title", help="heading; the name of the experiment folders without the seed by default")
    group = parser.add_argument_group("where things are")
    group.add_argument("--data-root", default="data", metavar="DIR", help="folder of the data directories")
    group.add_argument("--dump-root", default="dump", metavar="DIR", help="folder of the dump directories")
    group = parser.add_argument_group("outputs")
    group.add_argument("--results", metavar="FILE", help="RESULTS.md to write; OUTPUT_DIR/RESULTS.md by default")
    group.add_argument(
        "--output-dir", required=True, metavar="DIR", help="folder for images/, tensorboard/ and report.html"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    setup_logging(args.verbose)
    from sdumc.files import write_text
    from sdumc.reporting.drawing import write_figures
    from sdumc.reporting.figures import set_figures, training_figures, write_board
    from sdumc.reporting.protocols import protocol_figures
    from sdumc.reporting.report import page_html, results_markdown
    from sdumc.reporting.sets import collect_runs, collect_set, used_set
    from sdumc.reporting.summary import summarise

    output_dir, data_root, dump_root = Path(args.output_dir), Path(args.data_root), Path(args.dump_root)
    runs = collect_runs(args.exp_dirs)
    train_set = used_set(runs, "train-dir", args.train_set)
    valid_set = used_set(runs, "valid-dir", args.valid_set)
    sets = [collect_set(runs, name, data_root, dump_root, output_dir) for name in dict.fromkeys(args.test_sets)]
    title = args.title or common_title([r.path.name for r in runs])
    summary = summarise(title, runs, sets, train_set, valid_set, data_root, dump_root)

    training = training_figures(runs, valid_set)
    by_set = {s.name: set_figures(s, runs) + protocol_figures(s.name, summary.protocols[s.name]) for s in sets}
    everything = [*training, *(f for figures in by_set.values() for f in figures)]
    images = write_figures(everything, output_dir / "images")
    for path in images:
        log.info("wrote %s", path)
    log.info("wrote %s", write_board(runs, images, output_dir / "tensorboard"))
    page = output_dir / "report.html"
    write_text(page, page_html(summary, training, by_set))
    log.info("wrote %s", page)
    # Last, as the sign that everything else is there.
    results = Path(args.results) if args.results else output_dir / "RESULTS.md"
    write_text(results, results_markdown(summary))
    log.info("wrote %s", results)


def common_title(names: Sequence[str]) -> str:
    """``train`` of ``train_seed1, train_seed2``."""
    stems = {name.rsplit("_seed", 1)[0] for name in names}
    return stems.pop() if len(stems) == 1 else ", ".join(names)


if __name__ == "__main__":
    run(main)
