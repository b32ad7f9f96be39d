"""Recipes on a real Slurm: stages 3 to 5, ranks on two nodes, a time limit in the middle of a training."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.cluster import Cluster
from helpers.dumps import make_dump
from helpers.stopping import wait_until, with_hooks
from helpers.tiny_recipe import clip

ROOT = Path(__file__).resolve().parents[2]
FINAL = ("model.valid-best.safetensors", "model.averaged.safetensors", "metrics.jsonl")
TRAIN = "batch-size: 8\nlr: 0.001\nepochs: 4\ndim: 16\ncontent-dim: 8\nsave-every: 4\n"
THREADS = "1"  # of each rank
PATIENCE = 1200  # seconds: more than any call of the stage script needs on a busy machine


def make_recipe(root: Path) -> Path:
    """A recipe with TEMPLATE's scripts and slurm.conf, in a repository of its own."""
    recipe = root / "egs" / "tiny"
    (recipe / "conf").mkdir(parents=True)
    (root / "tools").mkdir()
    for name in ("sdumc", "utils", "tools/venv"):
        if (ROOT / name).exists():
            (root / name).symlink_to(ROOT / name)
    for name in ("sdumc.sh", "path.sh"):
        (recipe / name).symlink_to(ROOT / "egs" / "TEMPLATE" / name)
    for name in ("cmd.sh", "conf/slurm.conf"):
        text = (ROOT / "egs" / "TEMPLATE" / name).read_text()
        # The nodes pretend to have more cores than there are: one thread for each task is enough.
        (recipe / name).write_text(text.replace("--num-threads 4", f"--num-threads {THREADS}"))
    (recipe / "utils").symlink_to("../../utils")
    (recipe / "conf" / "train.yaml").write_text(TRAIN)
    return recipe


def start(cluster: Cluster, recipe: Path, *words: object, env: dict[str, str] | None = None) -> subprocess.Popen:
    """The stage script on Slurm, in the background."""
    command = ["./sdumc.sh", "--cmd-backend", "slurm", *map(str, words)]
    given = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=recipe, env={**cluster.env, **(env or {})}, **given)


def ended(process: subprocess.Popen, recipe: Path) -> str:
    """What the stage script printed; it must have ended well."""
    try:
        said, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.terminate()
        said, _ = process.communicate()
    logs = [f"--- {p}\n{p.read_text()[-3000:]}" for p in recipe.rglob("log/*.log")] if process.returncode else []
    assert process.returncode == 0, "\n".join([said, *logs])
    return said


def call(cluster: Cluster, recipe: Path, *words: object) -> str:
    """The stage script on Slurm; what it printed."""
    return ended(start(cluster, recipe, *words), recipe)


def test_stages_3_to_5(cluster, tmp_path, monkeypatch):
    """A recipe on tiny models; stage 3 first with more jobs than utterances."""
    import torch
    from helpers import tiny_models

    from sdumc.data.dump import load_dump
    from sdumc.pretrained.projector import Projector, save_projector

    recipe = make_recipe(tmp_path)
    monkeypatch.chdir(recipe)
    tiny_models.wavlm(Path("models/encoder"))
    tiny_models.llama(Path("models/llm"), seed=1)
    tiny_models.vit(Path("models/vision"))
    torch.manual_seed(0)
    save_projector("models/projector/projector.safetensors", Projector(encoder_dim=32, llm_dim=48, k=5, hidden=16))
    tiny_models.data_dir(Path("data/all"), [0.6, 0.9, 0.7])
    ids = [line.split()[0] for line in Path("data/all/utt2spk").read_text().splitlines()]
    for i, utt in enumerate(ids):
        clip(Path(f"data/all/wav/{utt}.mp4"), 0.6, i)
    Path("data/all/video.scp").write_text("".join(f"{u} data/all/wav/{u}.mp4\n" for u in ids))
    Path("data/all/wav.scp").write_text(Path("data/all/video.scp").read_text())
    Path("data/all/utt2dur").unlink()
    for name, text in {"audio": "layer: -2\n", "text": "layers: '-2'\n", "video": "fps: 5\n"}.items():
        Path(f"conf/{name}.yaml").write_text(text)

    words = ["--ngpu", 0, "--train-set", "all", "--valid-set", "all", "--test-sets", "all", "--stage", 3]
    words += ["--encoder", "models/encoder"]
    call(cluster, recipe, *words, "--stop-stage", 3, "--nj", 4)
    words += ["--llm", "models/llm", "--projector", "models/projector", "--vision-model", "models/vision"]
    words += ["--nj", 2, "--stop-stage", 5, "--conditions", "full none"]
    said = call(cluster, recipe, *words)
    assert "skip   audio all" in said
    dump = load_dump("dump/all")
    assert len(dump.utterances) == 3 and set(dump.features) == {"audio", "text", "video"}
    for condition in ("full", "none"):
        score = json.loads(Path(f"exp/train_seed1/decode_all/{condition}/score.json").read_text())
        assert score["n"] == 3 and score["mae"] > 0
    assert "nothing to do" in call(cluster, recipe, *words)
    assert not cluster.jobs()


def test_two_nodes_of_four_gpus(cluster, tmp_path):
    """What `--num-nodes 2 --ngpu 4` makes of a training: eight ranks, four a node, that know where to meet."""
    recipe = make_recipe(tmp_path)
    (tmp_path / "sdumc").unlink()
    (tmp_path / "sdumc" / "bin").mkdir(parents=True)
    for package in ("sdumc", "sdumc/bin"):
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "sdumc" / "bin" / "train.py").write_text(
        "import os, pathlib, sys\n"
        "e = os.environ\n"
        "names = ('SLURM_STEP_NUM_TASKS', 'SLURM_GPUS_ON_NODE', 'OMP_NUM_THREADS', 'MASTER_PORT', 'SLURMD_NODENAME')\n"
        "exp = pathlib.Path(sys.argv[sys.argv.index('--exp-dir') + 1])\n"
        "for name in ('config.yaml', 'model.valid-best.safetensors', 'model.averaged.safetensors'):\n"
        "    (exp / name).touch()\n"
        "(exp / f\"rank{e['SLURM_PROCID']}\").write_text(' '.join(e[n] for n in names))\n"
    )
    for name in ("train", "valid"):
        (recipe / "dump" / name).mkdir(parents=True)
        (recipe / "dump" / name / "utt2label").write_text("a 1\n")
    call(cluster, recipe, "--stage", 4, "--stop-stage", 4, "--num-nodes", 2, "--ngpu", 4)
    ranks = [(recipe / f"exp/train_seed1/rank{i}").read_text().split() for i in range(8)]
    assert len({tuple(r[:4]) for r in ranks}) == 1 and ranks[0][:3] == ["8", "4", THREADS], ranks
    assert [r[4] for r in ranks] == ["node1"] * 4 + ["node2"] * 4


def test_one_process_of_a_job_for_several_is_no_rank(monkeypatch):
    from sdumc.training.distributed import _environment

    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_PROCID": "2", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    assert _environment() is None  # a batch script or an interactive session
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert _environment() == (2, 4, 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A recipe with features made of numbers, and exp/torchrun, trained by torchrun on four ranks."""
    recipe = make_recipe(tmp_path_factory.mktemp("trained"))
    make_dump(recipe / "dump" / "train", 41, 1, absent={"video": {3, 4}, "text_sim": {7}, "text": {9}})
    make_dump(recipe / "dump" / "valid", 11, 2)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "sdumc.bin.train"]
    words = ["--config", "conf/train.yaml", "--train-dir", "dump/train", "--valid-dir", "dump/valid", "--seed", "1"]
    done = subprocess.run(
        [sys.executable, *launcher, *words, "--exp-dir", "exp/torchrun", "--device", "cpu"],
        cwd=recipe,
        env={**os.environ, "OMP_NUM_THREADS": THREADS},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    return recipe


def assert_as_by_torchrun(recipe: Path, tag: str) -> None:
    for name in FINAL:
        ours, theirs = (recipe / "exp" / folder / name for folder in (f"{tag}_seed1", "torchrun"))
        assert ours.read_bytes() == theirs.read_bytes(), name


STAGE_4 = ("--stage", 4, "--stop-stage", 4, "--ngpu", 0, "--num-nodes", 2, "--nproc", 2)


def test_four_ranks_on_two_nodes_learn_bit_for_bit_what_torchrun_does(cluster, trained):
    call(cluster, trained, *STAGE_4, "--exp-tag", "nodes")
    assert_as_by_torchrun(trained, "nodes")
    assert "4 x cpu" in (trained / "exp/nodes_seed1/train.log").read_text()


def test_a_time_limit_in_the_middle_changes_nothing(cluster, trained):
    """A training too slow for its time is warned, saves, is requeued, goes on and ends with the same bytes."""
    conf = trained / "conf" / "slurm.conf"
    text = conf.read_text()
    # Slurm looks at limits every half minute: the warning comes within a minute, and leaves three to save in.
    conf.write_text(text.replace("--time=$0", "--time=4").replace("USR1@120", "USR1@215"))
    # Every step takes twelve seconds until there is a file `quick`: all of them more than the time limit.
    slow = with_hooks({}, SDUMC_TEST_SLOW=f"12 {trained}/quick")
    process = start(cluster, trained, *STAGE_4, "--exp-tag", "limited", env=slow)
    exp = trained / "exp" / "limited_seed1"
    log = exp / "train.log"
    stopped = re.compile(r"stopped by a signal at step (\d+)")
    wait_until(lambda: process.poll() is not None or (log.exists() and stopped.search(log.read_text())))
    (trained / "quick").touch()
    if process.poll() is None:
        number = (exp / "log/q/train.id").read_text().strip()
        cluster.call("scontrol", "update", f"JobId={number}", "TimeLimit=60")  # a busy machine may need it
    ended(process, trained)
    conf.write_text(text)
    step = int(stopped.search(log.read_text())[1])
    assert 1 <= step < 24 and f", step {step}\n" in log.read_text().partition("resuming at epoch")[2], log.read_text()
    assert ", requeued\n" in (exp / "log/train.log").read_text()
    assert_as_by_torchrun(trained, "limited")
