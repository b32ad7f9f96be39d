"""The report on a made-up recipe folder: its numbers, its files, and what it says when something is missing."""

import base64
import html
import html.parser
import io
import json
import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from helpers.browser import find_browser
from helpers.report_tree import make_tree

from sdumc.bin.report import common_title, main
from sdumc.data.dump import load_dump
from sdumc.data.tables import read_table, write_table
from sdumc.errors import UserError
from sdumc.reporting import drawing, scores
from sdumc.reporting.scores import _findings, spread
from sdumc.reporting.sets import media_links
from sdumc.scale import CMU
from sdumc.scoring.attention import read_attention
from sdumc.scoring.metrics import Bootstrap, format_measure, read_predictions

ARGS = ["--exp-dirs", "exp/train_seed1", "exp/train_seed2", "--output-dir", "exp/report", "--results", "RESULTS.md"]

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipe")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        make_tree(Path("."), seeds=(1, 2))
        main(ARGS)
    return root


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_tree(Path("."), seeds=(1, 2), sizes={"train": 20, "valid": 8, "test": 10}, epochs=2)
    return tmp_path


@pytest.fixture
def quick(monkeypatch):
    """Leave out the drawing where a test is about the words."""
    monkeypatch.setattr(drawing, "render", lambda *a, **k: PIXEL)
    monkeypatch.setattr("sdumc.reporting.report.render", lambda *a, **k: PIXEL)


def rows_of(markdown: str) -> dict[str, list[str]]:
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in markdown.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in cells}


def scores_of(root: Path, condition: str, measure: str) -> np.ndarray:
    files = [root / f"exp/train_seed{s}/decode_test/{condition}/score.json" for s in (1, 2)]
    return np.array([json.loads(f.read_text())[measure] for f in files])


def resampled(root: Path, condition: str) -> tuple[Bootstrap, np.ndarray]:
    """Intervals over the speakers of the made-up set, and the predictions (2, N) of a condition."""
    tables = [read_predictions(root / f"exp/train_seed{s}/decode_test/{condition}/predictions.tsv") for s in (1, 2)]
    bootstrap = Bootstrap(tables[0].labels, [utt.split("-")[0] for utt in tables[0].ids])
    return bootstrap, np.stack([t.predictions for t in tables])


def test_table_is_mean_and_interval_of_the_scores(made):
    text = (made / "RESULTS.md").read_text()
    rows = rows_of(text)
    for condition, title in (("full", "full: real text"), ("none", "none: no text")):
        bootstrap, p = resampled(made, condition)
        limits = bootstrap.intervals(p)
        for column, measure in enumerate(CMU.measures):
            mean = scores_of(made, condition, measure).mean()
            assert rows[title][column] == format_measure(measure, mean, interval=limits[measure])
        deviation = scores_of(made, condition, "mae").std(ddof=1)
        assert re.search(rf"deviation of the MAE over seeds: .*{condition} {deviation:.3f}", text)
    assert re.fullmatch(r"0\.\d{3} \[0\.\d\d, 0\.\d\d\]", rows["full: real text"][0])
    ensemble = np.abs(resampled(made, "full")[1].mean(axis=0) - resampled(made, "full")[0].labels).mean()
    assert rows["full, mean of the seeds' predictions"][0].startswith(f"{ensemble:.3f} [")


def test_differences_are_paired_and_only_shown_ones_are_claimed(made):
    text = (made / "RESULTS.md").read_text()
    for a, b in (("full", "missing"), ("missing", "none")):
        (bootstrap, one), (_, other) = (resampled(made, c) for c in (a, b))
        low, high = bootstrap.limits(bootstrap.resample(one)["mae"] - bootstrap.resample(other)["mae"])
        verdict = "yes" if high < 0 else "NO" if low > 0 else "not shown"
        assert re.search(rf"\* {verdict}: {a} beats {b}: MAE 0.* \[{low:+.3f}, {high:+.3f}\]".replace("+", r"\+"), text)
    # Other recipes' runs may be worse, or no different.
    mae = {("model", "full"): 0.5, ("ridge", "full"): 0.6}
    shown = SimpleNamespace(shown={"full": None}, conditions={"full": None})
    for shift, verdict in ((-1.0, "yes"), (1.0, "NO"), (0.0, "not shown")):
        values = np.linspace(-0.5, 0.5, 2000) + shift
        draws = {("model", "full"): values, ("ridge", "full"): np.zeros(2000)}
        (finding,) = _findings(shown, mae, draws, bootstrap)
        assert finding.verdict == verdict and "0.500 against 0.600, difference -0.100 [" in finding.text


def test_median_row_and_recovered_share(made):
    text = (made / "RESULTS.md").read_text()
    labels = {
        s: np.array([float(v.split()[1]) for v in (made / f"dump/{s}/utt2label").read_text().splitlines()])
        for s in ("train", "test")
    }
    median = np.median(labels["train"])
    row = rows_of(text)[f"median of the train labels ({median:.2f})"]
    assert row[0].startswith(f"{np.abs(labels['test'] - median).mean():.3f} [") and row[1] == "–"
    assert row[2] == "0.000 [0.00, 0.00]"
    mae = {c: scores_of(made, c, "mae") for c in ("full", "missing", "none")}
    share = 100 * np.mean((mae["none"] - mae["missing"]) / (mae["none"] - mae["full"]))
    low, high = re.search(rf"recovers {share:.0f}% \[(\d+), (\d+)\] of the gap", text).groups()
    assert int(low) < share < int(high)


def test_doubtful_runs_are_named(tree, quick):
    path = Path("exp/train_seed2/metrics.jsonl")
    entries = [json.loads(line) | {"choice": 9.0 - i} for i, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(e) + "\n" for e in entries))
    main(ARGS)
    for text in (Path("RESULTS.md").read_text(), html.unescape(Path("exp/report/report.html").read_text())):
        assert "Seed 2: the best epoch is the last one (2): still improving; train longer." in text
        assert "Seed 2: no epoch's valid MAE (at best 8.0000) beat predicting the median" in text
        assert "Seed 1: no epoch" not in text


@pytest.mark.parametrize("of", ["speakers", "utterances"])
def test_the_first_table_says_that_simulated_text_is_cross_fitted(tree, quick, of):
    path = Path("dump/train/text_sim.yaml")
    meta = f"projector_data: data/train\nprojector_saw: 0\nprojector_parts: 4\nprojector_parts_of: {of}\n"
    path.write_text(path.read_text() + meta)
    main(ARGS)
    for text in (Path("RESULTS.md").read_text(), html.unescape(Path("exp/report/report.html").read_text())):
        assert f"missing: simulated text (projector cross-fitted over 4 parts of the {of})" in text
        assert "The projector was trained on" not in text


@pytest.mark.parametrize(("saw", "words"), [(0, "another set, libri"), (60, "train itself"), (None, "")])
def test_the_first_table_says_what_the_projector_was_trained_on(tree, quick, saw, words):
    path = Path("dump/train/text_sim.yaml")
    path.write_text(path.read_text() + f"projector_data: data/libri\nprojector_saw: {'null' if saw is None else saw}\n")
    main(ARGS)
    title = f"missing: simulated text (projector trained on {words})" if words else "missing: simulated text"
    doubt = "The projector was trained on 60 of the "
    for text in (Path("RESULTS.md").read_text(), html.unescape(Path("exp/report/report.html").read_text())):
        assert title in text and (doubt in text) == bool(saw)
        assert words or "projector trained" not in text


def test_results_state_what_they_rest_on(made):
    text = (made / "RESULTS.md").read_text()
    assert (
        "40 utterances" in text
        and "Mean over 2 seeds (1, 2). In brackets 95% intervals: bootstrap over 5 spea" in text
        and "chosen on `valid`" in text
    )
    assert "15 parameters" in text and "dim: 256" in text and "compile: false" in text and "torch 2" in text
    rows = rows_of(text)
    for title in ("audio + text + video", "audio + text_sim + video", "audio + text_asr + video", "audio + video"):
        assert f"ridge: {title}" in rows
    assert rows["ridge: audio + text + video"][0] < rows["ridge: audio + video"][0]
    assert rows["test"]  # the last table with such a row
    assert "| test | 40 | 18.7% | 38 | 1 | 0 | 0 | 1 | 0 | 2 (asr: 1, cut: 1) | 24.3% |" in text
    assert str(made) not in text


def test_a_rerun_writes_the_same_files(made, monkeypatch):
    monkeypatch.chdir(made)
    paths = [p for p in [Path("RESULTS.md"), *Path("exp/report").rglob("*")] if p.is_file()]
    assert len(paths) == 10
    before = {p: p.read_bytes() for p in paths}
    main(ARGS)
    assert {p: p.read_bytes() for p in paths} == before


class Page(html.parser.HTMLParser):
    """Collects tags, and checks that they are closed in order."""

    VOID = frozenset(("meta", "link", "img", "source", "line", "path", "circle"))

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        self.words += data

    def all(self, *tags):
        return [a for t, a in self.tags if t in tags]


def test_page_is_whole_and_stands_alone(made):
    text = (made / "exp/report/report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not page.all("script", "iframe", "object") and "http" not in re.sub(r"data:[^\"]+", "", text)
    for image in page.all("img"):
        assert image["src"].startswith("data:image/png;base64,") and image["alt"]
    maps = sum(len(tags) for tags in heat_maps_of(text).values())
    assert len(page.all("img")) == 2 * (4 + 2 + 4 + 3 + 1 + 3) + maps  # every panel for light and for dark
    ids = {a["id"] for _, a in page.tags if "id" in a}
    for link in page.all("a"):
        assert not link["href"].startswith("#") or link["href"][1:] in ids
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "width=device-width" in text


def test_page_shows_words_as_words_and_links_to_media(made):
    page = Page((made / "exp/report/report.html").read_text())
    assert not page.all("b", "script") or "then" in page.words
    assert "<b>& then</b>" in page.words  # the transcript's own characters, not markup
    videos = page.all("video")
    assert len(videos) == 24
    for video in videos:
        target = (made / "exp/report" / unquote(urlsplit(video["src"]).path)).resolve()
        assert target.parent == (made / "clips").resolve()


def heat_maps_of(text: str) -> dict[str, list[dict]]:
    """The pictures of heat maps by utterance."""
    found: dict[str, list[dict]] = {}
    for tag in re.findall(r'<img src="data:image/png[^>]*>', text):
        (image,) = Page(tag).all("img")
        if "seven queries" not in image["alt"]:
            continue  # a figure
        found.setdefault(re.search(r" of (\S+);", image["alt"])[1], []).append(image)
    return found


def test_attention_is_drawn_beside_the_utterance(made):
    from matplotlib.image import imread

    page = (made / "exp/report/report.html").read_text()
    maps = heat_maps_of(page)
    first = re.search(r"<h4>(\S+)</h4>", page)[1]
    condition = made / "exp/train_seed1/decode_test/missing"
    stored = read_attention(condition)[first]
    titles = {utt: [re.search(r"over (.+?) of", image["alt"])[1] for image in images] for utt, images in maps.items()}
    seen = dict(zip(titles[first][:3], maps[first], strict=False))
    for title, modality in (("audio", "audio"), ("simulated text", "text"), ("video", "video")):
        pixels = imread(io.BytesIO(base64.b64decode(seen[title]["src"].partition(",")[2])))
        assert pixels.shape[:2] == stored[modality].shape == (7, pixels.shape[1])
        # Brighter is more: cividis grows in every channel but blue.
        brightness, expected = pixels[:, :, 0].ravel(), stored[modality].ravel()
        assert np.corrcoef(brightness, expected)[0, 1] > 0.9
    second = sorted(read_attention(condition))[1]  # the tree gives this one no video
    assert "video" not in titles.get(second, [])
    assert "frames, 0." in page and "0.1 s" in page  # 25 Hz, some ten frames


def test_axes_of_attention(made, monkeypatch):
    from sdumc.reporting.sets import collect_runs, collect_set

    monkeypatch.chdir(made)
    runs = collect_runs(["exp/train_seed1"])
    found = collect_set(runs, "test", Path("data"), Path("dump"), Path("exp/report"))
    utt = found.utterances[3]
    words = found.texts["text"][utt].split()
    axis = drawing.make_axis(found, "text", utt, len(words))
    assert (axis.title, axis.unit, axis.tokens) == ("real text", f"{len(words)} tokens", words)
    axis = drawing.make_axis(found, "text_sim", utt, 40)  # not the words' number: positions
    assert axis.tokens == [] and axis.ticks[0] == (1.25, "1") and len(axis.ticks) == 6
    assert drawing.make_axis(found, "audio", utt, 100).ticks == [(25.0 * i, f"{i} s") for i in range(5)]
    found.frame_rates.clear()
    axis = drawing.make_axis(found, "video", utt, 50)
    assert (axis.unit, axis.ticks) == ("50 frames", [(40.0 * i, f"{20 * i}") for i in range(3)])
    assert [drawing._round_step(x) for x in (0.04, 0.21, 1.0, 3.0, 7.0)] == pytest.approx([0.05, 0.5, 1, 5, 10])


def test_tokens_of_the_language_model(tmp_path):
    from helpers.tiny_models import llama

    from sdumc.reporting.sets import Tokeniser

    llama(tmp_path / "models/llm")
    label = Tokeniser("models/llm", tmp_path)
    assert label("the film was good .", 5) == ["the", "film", "was", "good", "."]
    assert label("the film", 3) == []
    assert Tokeniser("models/none", tmp_path)("a b", 2) == ["a", "b"]
    (tmp_path / "models/llm/tokenizer.json").write_text("{")
    assert Tokeniser("models/llm", tmp_path)("a b", 2) == ["a", "b"]


def test_damaged_or_absent_attention(tree, quick):
    path = Path("exp/train_seed1/decode_test/full/attention.npz")
    path.write_bytes(path.read_bytes()[:500])
    assert "attention.npz: cannot be read" in refused()
    for path in Path("exp").glob("*/decode_test/*/attention.npz"):
        path.unlink()
    main(ARGS)
    text = Path("exp/report/report.html").read_text()
    assert "No attention over frames: decode again" in text and "Heat maps" not in text
    assert not Path("exp/report/images/test_attention_over_frames.png").exists()


def test_tensorboard_has_the_curves_and_the_figures(made, quick, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(made)
    (path,) = Path("exp/report/tensorboard").iterdir()
    assert not (path.stat().st_mode & 0o111)
    board = EventAccumulator(str(path.parent)).Reload()
    histories = [
        [json.loads(line) for line in Path(f"exp/train_seed{s}/metrics.jsonl").read_text().splitlines()] for s in (1, 2)
    ]
    for tag in ("train/loss", "train/rnc", "valid/full/mae", "valid/missing/corr"):
        values = []
        for history in histories:
            entries = history
            for key in tag.split("/"):
                entries = [entry[key] for entry in entries]
            values.append(entries)
        events = board.Scalars(tag)
        assert [e.step for e in events] == [entry["epoch"] for entry in histories[0]]
        np.testing.assert_allclose([e.value for e in events], np.mean(values, axis=0), rtol=1e-6)
    images = {p.stem: p for p in Path("exp/report/images").iterdir()}
    assert {f"figures/{name}" for name in images} == set(board.Tags()["images"])
    for name, image in images.items():
        (event,) = board.Images(f"figures/{name}")
        assert event.encoded_image_string == image.read_bytes() and event.width > 300

    # A run's own folder keeps its curves; a second report takes the place of the first.
    own = Path("exp/train_seed1/tensorboard")
    own.mkdir()
    (own / "events.out.tfevents.1.train").write_bytes(b"")
    for _ in range(2):
        main(["--exp-dirs", "exp/train_seed1", "--output-dir", "exp/train_seed1"])
    assert len(list(own.iterdir())) == 2
    board = EventAccumulator(str(next(own.glob("*.report")))).Reload()
    assert board.Tags()["images"] and not board.Tags()["scalars"]
    for name in ("tensorboard", "images"):
        shutil.rmtree(f"exp/train_seed1/{name}")


def test_figures_are_written(made):
    names = {p.name for p in (made / "exp/report/images").iterdir()}
    assert names == {
        "training_curves.png",
        "test_predicted_vs_true.png",
        "test_error_by_label.png",
        "test_similarity.png",
        "test_query_attention.png",
        "test_attention_over_frames.png",
        "test_error_by_speaker.png",
    }
    for name in names:
        assert (made / "exp/report/images" / name).read_bytes().startswith(b"\x89PNG")


def test_characters_without_a_font_are_logged(caplog, recwarn):
    panel = drawing.Panel(lambda ax, theme: ax.set_title("a \U00013000"), alt="a hieroglyph")
    assert drawing.render([panel], 1).startswith(b"\x89PNG")
    assert drawing.render([panel], 1).startswith(b"\x89PNG")
    assert not recwarn.list
    (record,) = caplog.records
    assert record.getMessage().startswith("figures: no font here has \U00013000;")


def test_baselines_of_a_train_set_on_another_scale(tree, quick):
    def baselines() -> list[str]:
        main(["--exp-dirs", "exp/train_seed1", "--output-dir", "exp/report"])
        lines = Path("exp/report/RESULTS.md").read_text().splitlines()
        return [line.split("|")[2] for line in lines if line.startswith(("| ridge", "| median"))]  # their MAE

    before = baselines()
    for name in ("train", "valid"):
        labels = read_table(Path("dump") / name / "utt2label")
        write_table(
            Path("dump") / name / "utt2label", {u: f"{(float(y) + 3) * 100 / 6:.9f}" for u, y in labels.items()}
        )
        (Path("dump") / name / "scale.yaml").write_text("low: 0\nhigh: 100\nclasses: none\n")
    assert len(before) >= 2 and baselines() == before
    assert "Labels of the train set are from 0 to 100" in Path("exp/report/RESULTS.md").read_text()


def test_one_seed_and_no_extras(tree, quick):
    """A dump made elsewhere: no data directory, no text, no quality, no saved model."""
    shutil.rmtree("data")
    for path in Path("dump").rglob("*"):
        if (path.name.startswith("text") and path.is_file()) or path.name in ("utt2spk",):
            path.unlink()
    Path("exp/train_seed1/model.valid-best.safetensors").unlink()
    shutil.rmtree("exp/train_seed1/decode_test/none")
    main(["--exp-dirs", "exp/train_seed1", "--output-dir", "exp/report"])
    text = Path("exp/report/RESULTS.md").read_text()
    assert "One run, seed 1. In brackets 95% intervals: bootstrap over 10 utterances." in text and "±" not in text
    assert "No speakers are known" in text and "mean of the seeds" not in text
    assert "undefined here" in text and "unknown parameters" in text and "ridge: audio + video" in text
    page = Page(Path("exp/report/report.html").read_text())
    assert "No players" in page.words and "No errors by speaker" in page.words
    assert not page.all("video", "audio")


def test_without_dump_there_are_no_baselines_but_a_note(tree, quick):
    shutil.rmtree("dump/valid")
    main(ARGS)
    text = Path("RESULTS.md").read_text()
    assert "No baselines: dump lacks train or valid" in text and "ridge:" not in text


def test_a_feature_of_other_dimensions_in_one_set_is_named(tree):
    dumps = {name: load_dump(Path("dump") / name) for name in ("train", "valid", "test")}
    audio = dumps["test"].features["audio"]
    dumps["test"].features["audio"] = replace(audio, dim=audio.dim + 1)
    with pytest.raises(UserError, match="the feature audio has different dimensions"):
        scores.fit_ridges(dumps, "train", "valid", Path("dump"))


def test_two_conditions_with_the_same_features_share_a_ridge_row(tree, quick, monkeypatch):
    monkeypatch.setattr("sdumc.reporting.summary.fit_ridges", lambda *a: scores.fit_ridges(*a[:-1], "asr"))
    main(ARGS)
    text = Path("RESULTS.md").read_text()
    assert text.count("| ridge: audio + text_asr + video |") == 1 and "text_sim + video |" not in text
    for name in ("missing", "asr"):
        assert f": {name} beats ridge on the same modalities: MAE" in text


def test_other_conditions_get_rows_but_no_claims(tree, quick):
    for seed in (1, 2):
        folder = Path(f"exp/train_seed{seed}/decode_test")
        shutil.copytree(folder / "none", folder / "audio")
        shutil.copytree(folder / "none", folder / "zebra")
    main(ARGS)
    rows = rows_of(Path("RESULTS.md").read_text())
    order = list(rows)
    assert order.index("none: no text") < order.index("audio: nothing else") < order.index("zebra")
    assert "at worst" in Path("RESULTS.md").read_text()


def test_the_sets_are_those_that_training_recorded(tree, quick):
    assert "valid-dir is dump/valid, not the set test" in refused("--valid-set", "test")
    for seed in (1, 2):
        shutil.copytree(f"exp/train_seed{seed}/decode_test", f"exp/train_seed{seed}/decode_dev")
        config = Path(f"exp/train_seed{seed}/config.yaml")
        config.write_text(config.read_text().replace("dump/valid", "dump/dev"))
    shutil.move("dump/test", "dump/dev")
    main([*ARGS, "--test-sets", "dev"])
    text = Path("RESULTS.md").read_text()
    assert "was chosen on `dev`" in text and "This set was used to choose the epoch" in text
    config.write_text(config.read_text().replace("dump/dev", "dump/valid"))
    assert "the runs differ in valid-dir" in refused()


def refused(*changes) -> str:
    with pytest.raises(UserError) as e:
        main([*ARGS, *changes])
    return str(e.value)


def test_missing_pieces_name_what_to_run(tree, quick):
    decoded = Path("exp/train_seed2/decode_test")
    shutil.move(decoded / "asr", "asr")
    message = refused()
    assert "decode_test/asr: not decoded" in message and "sdumc.bin.decode --exp-dir exp/train_seed2" in message
    shutil.move("asr", decoded / "asr")

    (decoded / "full/score.json").rename("score.json")
    assert "sdumc.bin.score --predictions exp/train_seed2/decode_test/full/predictions.tsv" in refused()
    Path("score.json").rename(decoded / "full/score.json")

    (decoded / "full/internals.npz").rename("internals.npz")
    assert "internals.npz: not there; decode" in refused()
    Path("internals.npz").rename(decoded / "full/internals.npz")

    Path("exp/train_seed2/metrics.jsonl").rename("metrics.jsonl")
    assert "metrics.jsonl: cannot be read" in refused() and "stage 4" in refused()
    Path("metrics.jsonl").rename("exp/train_seed2/metrics.jsonl")

    assert "no condition was decoded" in refused("--test-sets", "valid")
    assert "no such experiment folder" in refused("--exp-dirs", "exp/train_seed9")
    assert not Path("RESULTS.md").exists()
    main(ARGS)


def test_what_does_not_belong_together_is_refused(tree, quick):
    folder = Path("exp/train_seed1/decode_test/full")
    kept = (folder / "predictions.tsv").read_text()
    lines = kept.splitlines(keepends=True)
    (folder / "predictions.tsv").write_text("".join([lines[0], *lines[2:]]))
    assert "score.json: not the score of" in refused()
    (folder / "predictions.tsv").write_text(
        kept.replace("\t", "\t1", 3).replace("utt_id\t1prediction\t1", "utt_id\tprediction\t")
    )
    assert "score.json: not the score of" in refused()
    (folder / "predictions.tsv").write_text(kept)

    score = json.loads((folder / "score.json").read_text())
    (folder / "score.json").write_text(json.dumps({k: v for k, v in score.items() if k != "acc5"}))
    assert "not a score file" in refused()
    (folder / "score.json").write_text(json.dumps(score))

    (folder / "internals.npz").write_bytes((folder / "internals.npz").read_bytes()[:300])
    assert "internals.npz: cannot be read" in refused()
    shutil.copy(folder.parent / "missing/internals.npz", folder / "internals.npz")

    shutil.copytree("exp/train_seed1", "exp/again")
    assert "both seed 1" in refused("--exp-dirs", "exp/train_seed1", "exp/again")

    Path("exp/train_seed1/model.valid-best.safetensors").write_bytes(b"123")
    assert "safetensors" in refused()


def test_ridge_equals_the_normal_equations():
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    for n, d in ((50, 8), (12, 30)):  # the second goes by way of the smaller matrix
        x = rng.normal(size=(n, d))
        x -= x.mean(axis=0)
        y = x[:, 0] + rng.normal(size=n) + 2
        weights, intercept = scores.ridge_path(x, y, [0.1, 10.0])
        for w, penalty in zip(weights, (0.1, 10.0), strict=True):
            model = Ridge(alpha=penalty).fit(x, y)
            np.testing.assert_allclose(w, model.coef_, atol=1e-8)
            assert intercept == pytest.approx(model.intercept_)


def test_ridge_chooses_on_valid_and_stands_constant_and_absent_columns():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 5))
    x[:, 2] = 7.0
    y = 0.5 * x[:, 0]
    train, valid = x[:30].copy(), x[30:]
    train[3] = np.nan  # this utterance has no such modality
    ridge = scores.fit_ridge([train], y[:30], [valid], y[30:])
    assert ridge.penalty < 1  # no noise, so hardly any penalty
    errors = []
    for penalty in scores.PENALTIES:
        weights, b = scores.ridge_path(ridge.standardisers[0](train), y[:30], [penalty])
        errors.append(np.abs(ridge.standardisers[0](valid) @ weights[0] + b - y[30:]).mean())
    assert np.abs(ridge([valid]) - y[30:]).mean() == pytest.approx(min(errors))


def test_spread_and_format():
    assert spread([1.0]) == (1.0, None)
    assert spread([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert format_measure("mae", 0.5, 0.01) == "0.500 ± 0.010"
    assert format_measure("acc7", 0.5, None) == "50.0"
    assert format_measure("corr", float("nan"), None) == "–"


def test_media_links(tmp_path):
    data = tmp_path / "data/test"
    data.mkdir(parents=True)
    (data / "wav.scp").write_text(f"rec {tmp_path}/a b/rec#1.wav\n")
    (data / "segments").write_text("rec-1 rec 0.5 2.25\nrec-2 rec 2.25 4\n")
    links = media_links(data, ["rec-1", "rec-2", "rec-3"], tmp_path / "exp/report")
    assert links["rec-1"].href == "../../a%20b/rec%231.wav#t=0.5,2.25" and links["rec-1"].kind == "audio"
    assert set(links) == {"rec-1", "rec-2"}


def test_title():
    assert common_title(["train_seed1", "train_seed2"]) == "train"
    assert common_title(["a", "b_seed1"]) == "a, b_seed1"


PROBE = """<script>
addEventListener("load", () => setTimeout(() => {
  const shown = [...document.querySelectorAll(".panels img")].filter(i => getComputedStyle(i).display != "none");
  const maps = [...document.querySelectorAll(".heat img")];
  const players = [...document.querySelectorAll("video")];
  const edges = [...document.querySelectorAll(".heat img, .card, .card video, .panels img, .tile")];
  document.body.dataset.probe = JSON.stringify({
    figures: shown.length, drawn: shown.filter(i => i.naturalWidth > 300).length,
    maps: maps.filter(i => i.naturalHeight == 7 && i.clientHeight == 77 && i.clientWidth > 150).length,
    beside: maps.filter(i => ["video", "dd"].every(t => i.closest(".card").querySelector(t))).length,
    players: players.length, loaded: players.filter(v => v.readyState >= 1 && v.duration > 0.5 && !v.error).length,
    cut: edges.filter(e => e.getBoundingClientRect().right > innerWidth + 1).length,
    wide: document.documentElement.scrollWidth > innerWidth, width: innerWidth,
    back: getComputedStyle(document.body).backgroundColor,
  });
  parent.postMessage(document.body.dataset.probe, "*");
}, 2500));
</script></body>"""

# A window cannot be as narrow as a telephone, but a frame in it can.
FRAME = """<!DOCTYPE html><html lang="en"><head><link rel="icon" href="data:,"></head><body>
<iframe src="PAGE" style="width: 360px; height: 800px"></iframe>
<script>addEventListener("message", e => { document.body.dataset.probe = e.data; });</script></body></html>"""
# What chromium does of itself, such as looking for updates, takes time and needs a network.
QUIET = ["quic", "background-networking", "component-update", "sync", "gpu"]


@pytest.fixture
def browse(tmp_path):
    """Chromium without a window; each call with an empty profile."""
    program = find_browser()
    if program is None:
        pytest.skip("no chromium; `tests/run.sh --with-browser` gets it")

    def call(*args: object) -> subprocess.CompletedProcess:
        command = [program, "--headless", "--no-sandbox", "--no-first-run", "--enable-logging=stderr"]
        command += [f"--disable-{what}" for what in QUIET]
        command += ["--virtual-time-budget=8000", f"--user-data-dir={tempfile.mkdtemp(dir=tmp_path)}", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=900)

    return call


@pytest.fixture(scope="module")
def filmed(made):
    """The same with clips to play."""
    from mini.clips import write_clip

    for line in (made / "data/test/wav.scp").read_text().splitlines():
        clip = made / line.split()[1]
        if not clip.exists():
            frames = [np.full((48, 64, 3), 5 * i, np.uint8) for i in range(25)]
            write_clip(clip, frames, 25, np.zeros(16000, np.float32), 16000)
    return made / "exp/report/report.html"


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.parametrize("width, dark", [(360, False), (360, True), (1280, False), (1280, True)])
def test_page_in_a_browser(browse, filmed, width, dark):
    text = filmed.read_text()
    page = filmed.with_name("probe.html")
    page.write_text(text.replace("</body>", PROBE))
    frame = filmed.with_name("frame.html")
    frame.write_text(FRAME.replace("PAGE", page.name))
    shown = frame if width == 360 else page
    done = browse(
        "--dump-dom", f"--window-size={max(width, 800)},900", *(["--force-dark-mode"] if dark else []), shown.as_uri()
    )
    page.unlink()
    frame.unlink()
    assert "CONSOLE" not in done.stderr  # where chromium writes errors and warnings of a page
    found = json.loads(html.unescape(re.search(r'data-probe="([^"]+)"', done.stdout).group(1)))
    assert found["width"] in (width, width - 15)  # but for a scroll bar
    assert found["figures"] == found["drawn"] == 17
    assert found["maps"] == found["beside"] == sum(map(len, heat_maps_of(text).values())) > 60
    assert found["players"] == found["loaded"] == 24
    assert not found["wide"] and not found["cut"]  # nothing makes the page itself scroll sideways
    assert found["back"] == ("rgb(27, 31, 36)" if dark else "rgb(255, 255, 255)")


@pytest.mark.slow
@pytest.mark.browser
def test_a_faulty_page_would_be_noticed(browse, tmp_path):
    (tmp_path / "x.html").write_text("<script>nothing.there()</script>")
    assert "CONSOLE" in browse("--dump-dom", (tmp_path / "x.html").as_uri()).stderr


@pytest.mark.slow
@pytest.mark.browser
def test_page_in_print(browse, filmed, tmp_path):
    """On white paper in dark mode too, without players; every figure and map is there."""
    browse("--force-dark-mode", f"--print-to-pdf={tmp_path / 'page.pdf'}", filmed.as_uri())
    pdf = (tmp_path / "page.pdf").read_bytes()
    pages = int(max(re.findall(rb"/Type\s*/Pages\b.*?/Count (\d+)", pdf, re.S), key=int))
    assert 5 < pages < 30
    maps = {image["src"] for images in heat_maps_of(filmed.read_text()).values() for image in images}
    # An image that is drawn twice is stored once; of the two themes only the light one is there.
    assert pdf.count(b"/Subtype /Image") >= 17 + len(maps)
    assert pdf.count(b"/Subtype /Image") < 2 * 17 + len(maps)
