"""egs/mosei end to end on miniatures of the three distributions, with tiny checkpoints of the real classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import mosei_miniature as mini
from helpers import tiny_models
from helpers.plain_network import released_weights
from helpers.recipes import call_recipe, copy_recipes

from sdumc.corpora.audit import leave_out
from sdumc.data.dump import load_dump
from sdumc.data.tables import read_table
from sdumc.pretrained.projector import Projector

CONF = {
    "projector": "steps: 2\nbatch-size: 2\nhidden: 16\nk: 5\nwarmup-steps: 1\ndtype: fp32\n",
    "asr": "language: en\nmax-new-tokens: 6\n",
    "simulation": "beam: 2\nmax-new-tokens: 6\nlayers: '-2'\n",
    "audio": "layer: -2\n",
    "text": "layers: '-2'\n",
    "video": "fps: 2\ndetector: yunet\n",
    "train": "batch-size: 4\nepochs: 2\ndim: 16\ncontent-dim: 8\n",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_models.wavlm(folder / "encoder")
    tiny_models.llama(folder / "llm")
    tiny_models.whisper(folder / "asr")
    tiny_models.vit(folder / "vision")
    tensors = Projector(32, 48, k=5, hidden=16).state_dict()
    torch.save({f"encoder_projector.{name}": value for name, value in tensors.items()}, folder / "model.pt")
    return folder


@pytest.fixture
def recipe(tmp_path, warm) -> Path:
    """egs/mosei in a repository of its own."""
    folder = copy_recipes(tmp_path, "mosei")
    (folder / "tiny").mkdir()
    for name, text in CONF.items():
        (folder / "tiny" / f"{name}.yaml").write_text(text)
    return folder


def small(models: Path | None = None) -> list[object]:
    """Options for a machine without GPU and little time."""
    words: list[object] = ["--ngpu", 0, "--nproc", 1, "--nj", 1, "--max-drop", 0.3]
    for name in CONF:
        words += [f"--{name}-config", f"tiny/{name}.yaml"]
    if models:
        for option, folder in (
            ("encoder", "encoder"),
            ("llm", "llm"),
            ("asr-model", "asr"),
            ("vision-model", "vision"),
        ):
            words += [f"--{option}", models / folder]
    return words


def scores(folder: Path) -> dict[str, dict]:
    return {f.parent.name: json.loads(f.read_text()) for f in folder.glob("*/score.json")}


@pytest.mark.slow
def test_raw(recipe, models, tmp_path):
    corpus = mini.make_raw(tmp_path / "corpus", "csd")
    words = ["--corpus-dir", corpus, "--folds", corpus / "cmu_mosei_std_folds.py", *small(models)]
    output = call_recipe(recipe, *words, "--stop-stage", 1)
    assert "train  2 (2249)  7 (16326)   1" in output
    assert "gone1234567-0" in (recipe / "data/train/dropped.tsv").read_text()
    # Two more sets: one without a single face, and one without a film: absent in all of it, and the stages go on.
    gone = {u: "not wanted" for u in read_table(recipe / "data/test/utt2spk") if not u.startswith(mini.FACELESS)}
    for name in ("faceless", "filmless"):
        leave_out(recipe / "data/test", recipe / "data" / name, gone)
    (recipe / "data/filmless/video.scp").unlink()
    words_2 = [*words, "--test-sets", "test faceless filmless", "--stage", 2]
    call_recipe(recipe, *words_2)
    test = load_dump(recipe / "dump/test")
    assert set(test.features) == {"audio", "text", "text_sim", "text_asr", "video"}
    assert set(test.features["video"].absent) == {f"{mini.FACELESS}-0", f"{mini.FACELESS}-1"}
    assert not load_dump(recipe / "dump/train").features["video"].absent
    assert (recipe / "RESULTS.md").exists()
    for name, count in (("test", 4), ("faceless", 2), ("filmless", 2)):
        found = scores(recipe / f"exp/train_seed1/decode_{name}")
        assert set(found) == {"full", "missing", "asr", "none"} and found["full"]["n"] == count
        video = load_dump(recipe / "dump" / name).features["video"]
        assert len(video.absent) == 2 and len(video.entries) == count - 2 and video.dim == 24

    audit = ["--sets", "train", "--leave-out", "--max-wer", "0.1", "--min-overlap", "0.2", "--min-words", "2"]
    output = call_recipe(recipe, *audit, script="local/audit_transcripts.sh")
    assert "of 7 clips are suspicious" in output
    clean = load_dump(recipe / "dump/train_clean")
    left_out = (recipe / "data/train_clean/dropped.tsv").read_text().splitlines()
    assert len(clean.utterances) + len(left_out) == 7 and left_out
    for again in ([*words, "--stop-stage", 1], words_2):
        output = call_recipe(recipe, *again)
        assert "nothing to do" in output, output


@pytest.mark.slow
def test_toolkit(recipe, tmp_path):
    pickle = mini.make_pickle(tmp_path / "unaligned_50.pkl")
    output = call_recipe(recipe, "--source", "toolkit", "--pickle", pickle, *small())
    assert "SHA-256" in output and "audio: 3 values of 1 utterances were not finite, set to 0" in output
    assert "keep   audio (imported)" in output and "none   text_sim: needs --encoder and --llm" in output
    found = scores(recipe / "exp/toolkit/train_seed1/decode_test")
    assert set(found) == {"full", "missing", "none"} and found["missing"]["mae"] == found["none"]["mae"]
    results = (recipe / "RESULTS.toolkit.md").read_text()
    assert "missing: no text (none was simulated)" in results and "missing is the same as none" in results
    assert "imulated text" not in results and "full beats none" in results
    page = (recipe / "exp/toolkit/train/report.html").read_text()
    assert "no text (none was simulated)" in page and "imulated text" not in page


@pytest.mark.slow
def test_toolkit_with_media(recipe, models, tmp_path):
    """Sound and pictures of the pickle; text by the LLM: given, recognised and simulated; up to the report."""
    corpus = mini.make_raw(tmp_path / "corpus", segmented=True)
    pickle = mini.make_pickle(tmp_path / "aligned_50.pkl", aligned=True)
    words = ["--source", "toolkit", "--pickle", pickle]
    call_recipe(recipe, *words, *small(), "--stop-stage", 1)  # before the media were there: the pickle's own text, too
    assert load_dump(recipe / "dump/toolkit/train").features["text"].dim == 768
    words += ["--corpus-dir", corpus, *small(models), "--projector", models / "model.pt"]
    output = call_recipe(recipe, *words)
    assert "keep   audio train (imported)" in output and "keep   video train (imported)" in output
    train = load_dump(recipe / "dump/toolkit/train")
    dims = {name: feature.dim for name, feature in train.features.items()}
    assert dims == {"audio": 74, "video": 35, "text": 48, "text_sim": 48, "text_asr": 48}
    found = scores(recipe / "exp/toolkit/train_seed1/decode_test")
    assert set(found) == {"full", "missing", "asr", "none"} and found["missing"]["mae"] != found["none"]["mae"]
    assert "missing: simulated text" in (recipe / "RESULTS.toolkit.md").read_text()
    output = call_recipe(recipe, *words)
    assert "nothing to do" in output, output


@pytest.mark.slow
def test_authors(recipe, tmp_path):
    corpus = mini.make_authors(tmp_path / "authors")
    words = ["--source", "authors", "--features-dir", corpus / "features", "--labels", corpus / "label_official.npz"]
    output = call_recipe(recipe, *words, "--transcripts", corpus / "transcription.csv", *small())
    assert "keep   text_sim (imported)" in output
    found = scores(recipe / "exp/authors/train_seed1/decode_test")
    assert set(found) == {"full", "missing", "none"} and found["missing"]["mae"] != found["none"]["mae"]
    weights = {f"model.{name}": value for name, value in released_weights().items()}
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "released.pt")
    output = call_recipe(recipe, "--checkpoint", tmp_path / "released.pt", script="local/decode_released.sh")
    assert "0.5060" in output
    found = scores(recipe / "exp/authors/released_none_false/decode_test_batch1")
    assert set(found) == {"full", "missing"} and found["full"]["n"] == 4


def test_stage_0_says_what_is_missing(recipe, models, tmp_path):
    output = call_recipe(recipe, *small(models), "--stop-stage", 0, code=1)
    assert "needs --corpus-dir" in output and "Traceback" not in output
    corpus = mini.make_raw(tmp_path / "corpus")
    damaged = Path(shutil.copytree(models, tmp_path / "damaged"))
    (damaged / "llm/model.safetensors").unlink()
    (damaged / "asr/preprocessor_config.json").unlink(missing_ok=True)
    (damaged / "asr/processor_config.json").unlink(missing_ok=True)
    weights = damaged / "encoder/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    words = ["--corpus-dir", corpus, "--folds", corpus / "folds", "--stop-stage", 0]
    output = call_recipe(recipe, *words, *small(damaged), code=1)
    assert "error: --encoder" in output and "incomplete model, cut short: model.safetensors" in output
    assert "error: --llm" in output and "neither model.safetensors nor pytorch_model.bin" in output
    assert "error: --asr-model" in output and "there is no preprocessor_config.json" in output
    assert "error: --vision-model" not in output and "fetch_models.sh" in output and "Traceback" not in output
    call_recipe(recipe, *words, *small(models))


def test_too_much_left_out_fails_stage_1_and_says_where_it_went(recipe, tmp_path):
    corpus = mini.make_raw(tmp_path / "corpus")
    words = ["--corpus-dir", corpus, "--folds", corpus / "folds", *small()[:-16], "--max-drop", 0.01]
    output = call_recipe(recipe, *words, "--stage", 1, "--stop-stage", 1, code=1)
    assert "1 of 8 labelled utterances (12.5%)" in output and "train  2 (2249)  7 (16326)" in output
    assert not (recipe / "data/train/wav.scp").exists()
    assert "gone1234567-0\tdata\tno media file" in (recipe / "data/train/dropped.tsv").read_text()
