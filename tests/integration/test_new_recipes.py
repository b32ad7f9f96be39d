"""The recipes from a table of docs/new_recipe.md, as a newcomer makes them: from the files to the report."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import soundfile
import yaml
from helpers import tiny_models
from helpers.commands import call_here

from sdumc.data.kaldi_dir import load_kaldi_dir
from sdumc.scale import scale_of

ROOT = Path(__file__).resolve().parents[2]
WALKS = ("sounds rated from 1 to 5", "three classes", "the toolkit's form", "texts alone")
SETS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_models.wavlm(folder / "encoder")
    tiny_models.wavlm(folder / "ctc", ctc=True)
    tiny_models.llama(folder / "llm", eos_bias=0.7, seed=1)
    return folder


def new_recipe(root: Path, walk: str) -> Path:
    """A repository in ``root`` and in it egs/own, by the command of the docs, with the ``local/data.sh`` of a walk."""
    for name in ("egs", "tools", "utils"):
        (root / name).mkdir()
    for path in (ROOT / "utils").iterdir():
        if path.name != "new_recipe.sh":
            (root / "utils" / path.name).symlink_to(path)
    shutil.copy(ROOT / "utils/new_recipe.sh", root / "utils")
    (root / "sdumc").symlink_to(ROOT / "sdumc")
    (root / "egs/TEMPLATE").symlink_to(ROOT / "egs/TEMPLATE")
    if (ROOT / "tools/venv").exists():
        (root / "tools/venv").symlink_to(ROOT / "tools/venv")
    call("utils/new_recipe.sh own", root)
    page = (ROOT / "docs/new_recipe.md").read_text(encoding="utf-8")
    scripts = [t for t in re.findall(r"^```bash\n((?:.*\n)*?)```$", page, flags=re.M) if "import_table" in t]
    (root / "egs/own/local/data.sh").write_text(scripts[WALKS.index(walk)])
    return root / "egs/own"


def call(words: str, folder: Path, code: int = 0) -> str:
    done = subprocess.run(
        shlex.split(words),
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def sound(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tiny_models.wave(0.5, seed), 16000)


def fill(corpus: Path, walk: str) -> None:
    """The files that the newcomer has."""
    corpus.mkdir()
    if walk == "sounds rated from 1 to 5":
        rows = ["file,rating,speaker,split,transcript"]
        for i in range(9):
            sound(corpus / f"wav/{i:04d}.wav", i)
            rows.append(f'{i:04d},{1 + i % 4}.5,s{i},{SETS[i % 3]},"well, it was number {i}"')
        (corpus / "ratings.csv").write_text("\n".join(rows))
    elif walk == "three classes":
        rows = ["path\tmood\tspeaker"]
        for i in range(18):
            sound(corpus / f"clips/{i}.wav", i)
            rows.append(f"clips/{i}.wav\t{['negative', 'neutral', 'positive'][i % 3]}\tp{i // 2}")
        (corpus / "moods.tsv").write_text("\n".join(rows))
    elif walk == "texts alone":
        rows = ["text,stars,split", *(f'"a film, {i} times",{1 + i % 5},{SETS[i % 3]}' for i in range(15))]
        (corpus / "comments.csv").write_text("\n".join(rows))
    else:
        rows = ["video_id,clip_id,text,label,label_T,label_A,label_V,annotation,mode"]
        for i in range(9):
            sound(corpus / f"Raw/video_{i}/0001.wav", i)
            rows.append(f"video_{i},1,不错,{(i - 4) / 5},0.2,0.4,0.6,Positive,{SETS[i % 3]}")
        (corpus / "label.csv").write_text("\n".join(rows), encoding="utf-8-sig")


# What differs from the template's run.sh and settings for models of this size.
NONE = "--encoder= --llm= --asr-model= --vision-model= "
OPTIONS = {
    WALKS[0]: NONE + "--encoder MODELS/encoder --llm MODELS/llm --asr-model MODELS/ctc --missing-text asr",
    WALKS[1]: NONE + "--encoder MODELS/encoder --missing-text none",
    WALKS[2]: NONE + "--encoder MODELS/encoder --llm MODELS/llm",
    WALKS[3]: "--encoder MODELS/encoder --llm MODELS/llm --asr-model MODELS/ctc --vision-model MODELS/vit",
}
SMALL = {
    "projector": "k: 5\nhidden: 16\nsteps: 2\nbatch-size: 2\nvalid-interval: 2\nmax-new-tokens: 4\n",
    "asr": "speech-test: level\n",
    "simulation": 'layers: "-2"\nbeam: 2\nmax-new-tokens: 4\nspeech-test: level\n',
    "audio": "layer: -2\n",
    "text": 'layers: "-2"\n',
    "train": "epochs: 2\nbatch-size: 4\ndim: 16\ncontent-dim: 8\nlr: 0.001\n",
}
FLOWS = dict(zip(WALKS, ("both", "missing", "both", "complete"), strict=True))
READS = dict(zip(WALKS, ("audio, real text", "audio only", "audio, real text", "real text only"), strict=True))
SCALES = dict(zip(WALKS, ((1, 5, "none"), (-1, 1, "nearest"), (-1, 1, "sims"), (1, 5, "nearest")), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("walk", WALKS)
def test_recipes_from_a_table(tmp_path, models, warm, walk):
    recipe = new_recipe(tmp_path, walk)
    fill(recipe / "corpus", walk)
    output = call("./run.sh --stop-stage 1 --ngpu 0", recipe)
    loaded = [load_kaldi_dir(recipe / "data" / name) for name in SETS]
    assert sum(len(data.utterances) for data in loaded) == (9, 18, 9, 15)[WALKS.index(walk)]
    scale = scale_of(recipe / "data/test")
    assert (scale.low, scale.high, scale.scheme) == SCALES[walk]
    assert ("none   sound and pictures train: there are transcripts alone" in output) == (walk == "texts alone")

    for name, text in SMALL.items():
        (recipe / "conf" / f"{name}.yaml").write_text(text)
    options = OPTIONS[walk].replace("MODELS", str(models))
    output = call(f"./run.sh --stage 2 --ngpu 0 --nproc 1 --nj 1 {options}", recipe)
    exp = next(recipe.glob("exp/*_seed1"))
    assert yaml.safe_load((exp / "config.yaml").read_text())["flows"] == FLOWS[walk]
    results = (recipe / "RESULTS.md").read_text()
    page = (recipe / "exp" / exp.name.removesuffix("_seed1") / "report.html").read_text()
    assert f"labels from {scale.ends}" in results and scale.named_ends in page
    trained = "Both flows were" if FLOWS[walk] == "both" else f"The {FLOWS[walk]} flow alone was"
    terms = "mse_missing" if FLOWS[walk] == "missing" else "mse_complete"
    for text in (results, page):
        assert f"{trained} trained, on" in text and terms in text.partition("trained, on")[2].partition(".")[0]
    log = (exp / "log/train.log").read_text()
    assert f"of {READS[walk]}" in log, log
    # The projector learns from the three train clips, of three speakers; and one more without each of them.
    crossed = "projector cross-fitted over 3 parts of the utterances" in results
    assert crossed == (walk == "the toolkit's form") == (recipe / "exp/projector_folds/3/train_utterances").exists()
    if walk == "texts alone":
        for line in ("text_sim: there is no sound to simulate text from", "audio: there is no sound"):
            assert f"none   {line}" in output
    else:
        clip = next((recipe / "corpus").rglob("*.wav"))
        done = call_here("predict", "--exp-dir", exp, "--device", "cpu", clip)
        assert done.returncode == 0 and f"scores from {scale.ends}" in done.stdout, done.stderr
    assert "nothing to do" in call(f"./run.sh --ngpu 0 --nproc 1 --nj 1 {options}", recipe)
