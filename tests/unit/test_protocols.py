"""Protocols of incomplete data: what is lost, that it is the same for every model, and their tables and curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.dumps import make_dump
from helpers.report_tree import make_tree

from sdumc.bin.decode import main
from sdumc.conditions import CONDITIONS, PATTERNS, PROTOCOL_RECORD, PROTOCOLS
from sdumc.data.batches import Batch
from sdumc.errors import UserError
from sdumc.hyperparameters import ModelConfig
from sdumc.model.network import SDUMC
from sdumc.reporting import drawing
from sdumc.scoring import decoding as p
from sdumc.scoring.metrics import read_predictions

INPUTS = {"audio": "audio", "text": "text", "video": "video"}


def load(exp: Path, which: str) -> SDUMC:
    """A network of random weights by the last digit of the folder's name; ``deaf`` reads no audio."""
    torch.manual_seed(int(exp.name[-1]) if exp.name[-1].isdigit() else 0)
    config = ModelConfig(0 if exp.name == "deaf" else 6, text_dim=10, video_dim=5, dim=16, content_dim=8)
    return SDUMC(config).eval()


@pytest.fixture
def decoded(tmp_path, monkeypatch):
    """``decode --protocol`` of a made-up dump, where utterance 3 has no audio; by exp folder and protocols."""
    monkeypatch.setattr("sdumc.training.checkpoint.load_model", load)
    dump = make_dump(tmp_path / "dump", count=14, absent={"audio": {3}})

    def run(exp: str, *words: str) -> Path:
        out = tmp_path / exp
        main(["--exp-dir", exp, "--data-dir", str(dump), "--device", "cpu", "--output-dir", str(out), *words])
        return out

    return run


def batch(size: int, frames: int = 50) -> Batch:
    features = {f: torch.ones(size, frames, 3) for f in INPUTS}
    lengths = {f: torch.full((size,), frames) for f in INPUTS}
    return Batch([f"s-{i}" for i in range(size)], torch.zeros(size), features, lengths)


def test_frames_are_lost_at_the_rate_each_on_its_own():
    masks = p.Masks("frames", 1)
    blanks = {"audio": torch.zeros(3), "text": torch.full((3,), 7.0), "video": torch.zeros(3)}
    given = batch(200)
    given.lengths["video"][:] = 20
    before: dict[str, torch.Tensor] = {}
    for rate in PROTOCOLS["frames"].rates:
        out = p.erase_frames(given, INPUTS, rate, masks, "full", blanks)
        lost = {f: (out.features[f] == blanks[f]).all(-1) for f in INPUTS}
        lost["video"][:, 20:] = False
        for f, length in (("audio", 50), ("text", 50), ("video", 20)):
            assert (
                abs(float(lost[f].sum()) / (200 * length) - rate)
                < 4 * (rate * (1 - rate) / (200 * length)) ** 0.5 + 1e-9
            )
        assert torch.equal(out.features["video"][:, 20:], given.features["video"][:, 20:])  # padding is no frame
        assert all(torch.equal(out.lengths[f], given.lengths[f]) for f in INPUTS)
        # Neither modalities nor utterances lose the same frames; what is lost at a low rate is lost at higher ones.
        if rate == 0.5:
            agree = (
                (lost["audio"] == lost["text"]).float().mean(),
                (lost["audio"][0] == lost["audio"][1]).float().mean(),
            )
            assert abs(float(agree[0]) - 0.5) < 0.03 and 0.2 < float(agree[1]) < 0.8
        assert all(bool((lost[f] | ~before[f]).all()) for f in before)
        before = lost
        assert masks.share("full", rate) == pytest.approx(sum(int(x.sum()) for x in lost.values()) / 24000)
    assert torch.equal(given.features["audio"], torch.ones(200, 50, 3))  # the batch itself is not touched


def test_modalities_are_lost_at_the_rate_but_never_all():
    masks, size = p.Masks("modalities", 1), 3000
    given = batch(size, frames=1)
    given.lengths["audio"][:500] = 0
    given.lengths["text"][:250] = 0  # of these, video alone is there
    for rate in PROTOCOLS["modalities"].rates:
        out = p.lose_modalities(given, INPUTS, rate, masks, "full")
        there = torch.stack([out.lengths[f] > 0 for f in INPUTS])
        assert bool(there.any(0).all()) and bool(there[2, :250].all())
        expected = rate - rate**3 / 3
        for row in there[:, 500:]:
            assert abs(1 - float(row.float().mean()) - expected) < 4 * (0.25 / 2500) ** 0.5
        whole = float(there[:, 500:].all(0).float().mean())
        assert abs(whole - (1 - rate) ** 3) < 4 * (0.25 / 2500) ** 0.5  # independent of each other
    assert int(given.lengths["audio"].sum()) == 2500


def test_masks_are_those_of_utterance_and_seed():
    a = p.draw("frames", 1, "s-1", "audio", 40)
    assert np.array_equal(a, p.draw("frames", 1, "s-1", "audio", 40)) and a.dtype == np.uint16
    for other in (("frames", 2, "s-1", "audio"), ("frames", 1, "s-2", "audio"), ("frames", 1, "s-1", "video")):
        assert not np.array_equal(a, p.draw(*other, 40))
    assert not p.is_lost(a, 0.0).any() and p.is_lost(a, 1.0).all()


def test_all_models_lose_the_same_and_it_is_stored(decoded):
    one, two = (decoded(exp, "--protocol", "frames", "modalities") for exp in ("a_seed1", "a_seed2"))
    for protocol in ("frames", "modalities"):
        records = [yaml.safe_load((out / protocol / PROTOCOL_RECORD).read_text()) for out in (one, two)]
        assert records[0] == records[1] and records[0]["conditions"] == ["full", "missing"]
        assert records[0]["lost"]["full"][0] == 0 < records[0]["lost"]["full"][9]
        stored = [dict(np.load(out / protocol / p.MASKS)) for out in (one, two)]
        assert stored[0].keys() == stored[1].keys() >= {"audio", "audio_ids", "audio_counts", "text", "text_sim"}
        assert all(np.array_equal(stored[0][k], stored[1][k]) for k in stored[0])
        # Stored draws are those that were used, by the rule that the docs give.
        utt, count = str(stored[0]["video_ids"][0]), int(stored[0]["video_counts"][0])
        assert np.array_equal(stored[0]["video"][:count], p.draw(protocol, 1, utt, "video", count))
    other = decoded("a_seed3", "--protocol", "frames", "--mask-seed", "2") / "frames" / p.MASKS
    assert not np.array_equal(np.load(other)["audio"], np.load(one / "frames" / p.MASKS)["audio"])


def test_predictions_of_the_protocols(decoded, tmp_path):
    out = decoded("a_seed1", "--protocol", *PROTOCOLS)
    plain = decoded("b_seed1", "--condition", *PATTERNS, "missing")

    def values(folder: Path) -> np.ndarray:
        return read_predictions(folder / "predictions.tsv").predictions

    assert yaml.safe_load((out / "patterns" / PROTOCOL_RECORD).read_text())["conditions"] == list(PATTERNS)
    for pattern in PATTERNS:
        np.testing.assert_allclose(values(out / "patterns" / pattern), values(plain / pattern), atol=2e-6)
    for protocol in ("frames", "modalities"):
        for condition in ("full", "missing"):
            np.testing.assert_allclose(values(out / protocol / condition / "0.0"), values(plain / condition), atol=2e-6)
            assert not np.allclose(values(out / protocol / condition / "0.9"), values(plain / condition), atol=1e-3)
    # The mean of several models, and a condition that was asked for.
    decoded("a_seed2", "--protocol", "frames", "--condition", "missing")
    assert not (tmp_path / "a_seed2/frames/full").exists()
    both = ["a_seed1", "a_seed2", "--data-dir", str(tmp_path / "dump"), "--output-dir", str(tmp_path / "both")]
    main(["--exp-dir", *both, "--device", "cpu", "--protocol", "frames"])
    mean = (values(out / "frames/missing/0.4") + values(tmp_path / "a_seed2/frames/missing/0.4")) / 2
    np.testing.assert_allclose(values(tmp_path / "both/frames/missing/0.4"), mean, atol=2e-6)


def test_what_dump_and_model_allow(decoded, tmp_path):
    out = decoded("deaf", "--protocol", "patterns")
    assert yaml.safe_load((out / "patterns" / PROTOCOL_RECORD).read_text())["conditions"] == [
        "text+video",
        "text",
        "video",
    ]
    dump = make_dump(tmp_path / "mute", count=6, names=("audio", "video"))
    places = ["--data-dir", str(dump), "--output-dir", str(tmp_path / "m")]
    main(["--exp-dir", "a_seed1", *places, "--device", "cpu", "--protocol", "patterns", "modalities"])
    assert yaml.safe_load((tmp_path / "m/patterns/protocol.yaml").read_text())["conditions"] == [
        *("audio+video", "audio", "video")
    ]
    assert yaml.safe_load((tmp_path / "m/modalities/protocol.yaml").read_text())["conditions"] == ["none"]
    with pytest.raises(UserError, match="--condition, or --protocol"):
        decoded("a_seed1")


def test_an_erased_word_is_the_mean_state():
    model = load(Path("a_seed1"), "")
    model.frame_projection["text"].mean.fill_(3.0)
    model.frame_projection["audio"].mean.fill_(2.0)
    found = p.blanks(model)
    assert float(found["text"].mean()) == 3 and not found["audio"].any() and not found["video"].any()


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A recipe with two seeds, decoded under all protocols by what stands for models."""
    monkeypatch.chdir(tmp_path)
    make_tree(Path("."), seeds=(1, 2), sizes={"train": 20, "valid": 8, "test": 30}, epochs=2)
    config = ModelConfig(6, 10, 4, dim=16, content_dim=8)

    def model(exp: Path, which: str) -> SDUMC:
        torch.manual_seed(int(exp.name[-1]))
        return SDUMC(config).eval()

    monkeypatch.setattr("sdumc.training.checkpoint.load_model", model)
    for seed in (1, 2):
        exp = f"exp/train_seed{seed}"
        places = ["--exp-dir", exp, "--data-dir", "dump/test", "--output-dir", f"{exp}/decode_test/protocols"]
        main([*places, "--device", "cpu", "--protocol", *PROTOCOLS])
    return tmp_path


REPORT = ["--exp-dirs", "exp/train_seed1", "exp/train_seed2", "--output-dir", "exp/report", "--results", "RESULTS.md"]


def test_tables_mean_and_curves_in_the_report(tree, monkeypatch):
    from sdumc.bin.report import main as report

    drawn = []
    monkeypatch.setattr(drawing, "render", lambda panels, *a, **k: drawn.append(panels) or b"")
    monkeypatch.setattr("sdumc.reporting.report.render", lambda *a, **k: b"")
    monkeypatch.setattr("sdumc.bin.report.write_board", lambda *a: None, raising=False)
    monkeypatch.setattr("sdumc.reporting.figures.write_board", lambda *a: None)
    report(REPORT)
    text, page = Path("RESULTS.md").read_text(), Path("exp/report/report.html").read_text()
    part = text.split("## Protocols on test")[1].split("\n## ")[0]
    assert part.count("| mean over 10 rates |") == 4 and part.count("| mean over 7 patterns |") == 1
    assert page.count("mean over 10 rates") == 4
    # The mean over rates is that of what the rows say, and its interval lies around it.
    maes = [
        np.mean(
            [
                np.abs(t.predictions - t.labels).mean()
                for t in (
                    read_predictions(
                        f"exp/train_seed{s}/decode_test/protocols/frames/full/{k / 10:.1f}/predictions.tsv"
                    )
                    for s in (1, 2)
                )
            ]
        )
        for k in range(10)
    ]
    row = part.split("frames, of full")[1].split("| mean over 10 rates | ")[1]
    mean, low, high = (float(x) for x in row.split(" |")[0].replace("[", "").replace("]", "").replace(",", "").split())
    assert mean == pytest.approx(np.mean(maes), abs=6e-4) and low < mean < high
    assert {f.name for f in Path("exp/report/images").glob("test_protocol_*.png")} == {
        f"test_protocol_{name}.png" for name in PROTOCOLS
    }
    for given in (CONDITIONS[c].given.partition(":")[0] for c in PATTERNS):
        assert f"| {given} |" in part

    # Seeds with other masks, or a seed that was not decoded, are not averaged.
    record = Path("exp/train_seed2/decode_test/protocols/frames/protocol.yaml")
    record.write_text(record.read_text().replace("mask_seed: 1", "mask_seed: 2"))
    with pytest.raises(UserError, match=r"not all seeds .* --protocols frames"):
        report(REPORT)


def test_curves_are_drawn(tree):
    from sdumc.reporting.protocols import protocol_figures, protocol_tables
    from sdumc.reporting.sets import collect_runs, collect_set

    runs = collect_runs(["exp/train_seed1", "exp/train_seed2"])
    test_set = collect_set(runs, "test", Path("data"), Path("dump"), Path("."))
    for figure in protocol_figures("test", protocol_tables(runs, test_set)):
        assert drawing.render(figure.panels, 2, dpi=30).startswith(b"\x89PNG")
