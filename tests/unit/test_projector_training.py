"""Training the projector on tiny models: what it writes, kills and signals, changed settings, too little memory."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from helpers import tiny_models
from safetensors.torch import load_file

from sdumc.bin import extract_text, finish_dump, simulate_text, train_projector
from sdumc.data.dump import load_dump, load_matrix
from sdumc.errors import EXIT_REQUEUE, UserError
from sdumc.machine import installed_versions
from sdumc.pretrained.projector import Projector, Vocabulary, load_projector, project, save_projector
from sdumc.pretrained.speech import projector_data
from sdumc.training import checkpoint, ctc
from sdumc.training import projector as training
from sdumc.training.checkpoint import hold_folder

FILES = {"projector.safetensors", "config.yaml", "train.log", "train_utterances"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    root = tmp_path_factory.mktemp("work")
    tiny_models.wavlm(root / "encoder")
    tiny_models.llama(root / "llm", eos_bias=0.7, seed=1)
    tiny_models.data_dir(root / "data", [0.5, 1.3, 0.9, 0.7, 1.1, 0.6, 0.8, 1.0, 0.4])
    return root


@pytest.fixture(autouse=True)
def restored_signals():
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def train(work, output, *more: str) -> int:
    """12 steps, a checkpoint after 5 and 10, the loss on valid after 4, 8 and 12; ``more`` overrides."""
    return train_projector.main(
        [
            *("--train-data-dir", str(work / "data"), "--valid-data-dir", str(work / "data")),
            *("--encoder", str(work / "encoder"), "--llm", str(work / "llm"), "--device", "cpu", "--hidden", "16"),
            *("--steps", "12", "--batch-size", "4", "--learning-rate", "0.01", "--warmup-steps", "2"),
            *("--valid-interval", "4", "--checkpoint-interval", "5", "--wer-utterances", "2", "--max-new-tokens", "5"),
            *("--output", str(output), *more),
        ]
    )


@pytest.fixture(scope="module")
def undisturbed(work, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "projector"
    assert train(work, output) == 0
    return output


def weights(folder) -> bytes:
    return (folder / "projector.safetensors").read_bytes()


def test_what_is_written(undisturbed):
    assert {p.name for p in undisturbed.iterdir()} == FILES
    assert [p.name for p in undisturbed.parent.iterdir()] == ["projector"]
    config = yaml.safe_load((undisturbed / "config.yaml").read_text())
    assert config["result"]["valid_wer"] is not None
    assert config["embedding_scale"] == 1.0
    assert config["versions"] == installed_versions() and "transformers" in config["versions"]
    lines = (undisturbed / "train.log").read_text().splitlines()
    losses = [float(line.split()[-1]) for line in lines if ": valid loss" in line and "WER" not in line]
    assert len(losses) == 3 and losses[-1] < losses[0]


def test_it_goes_with_its_prompt(work, undisturbed, tmp_path):
    words = ["--data-dir", work / "data", "--dump-dir", tmp_path, "--encoder", work / "encoder", "--llm", work / "llm"]
    with pytest.raises(UserError, match="trained with the prompt"):
        simulate_text.main([*map(str, words), "--projector", str(undisturbed), "--prompt", "long"])
    with pytest.raises(UserError, match="trained with the prompt template 'released'"):
        simulate_text.main([*map(str, words), "--projector", str(undisturbed), "--prompt-template", "Q: {prompt}"])
    assert yaml.safe_load((undisturbed / "config.yaml").read_text())["prompt_template"] == "released"


def test_it_says_what_it_was_trained_on(work, undisturbed, tmp_path):
    ids = [line.split()[0] for line in (work / "data" / "wav.scp").read_text().splitlines()]
    known = projector_data(str(undisturbed), [*ids[:2], "another"])
    assert known == {"projector_data": str(work / "data"), "projector_saw": 2}
    released = tmp_path / "projector.pt"
    assert projector_data(str(released), ids) == {"projector_data": None, "projector_saw": None}


def test_a_killed_run_ends_with_the_same_projector(work, undisturbed, tmp_path, monkeypatch):
    """Killed at step 9: after the checkpoint of step 5, and after a better loss on valid than the checkpoint knows."""
    steps, original = [], training.learning_rate

    def dying(step, settings):
        steps.append(step)
        if step == 9 and len(steps) == 10:
            raise KeyboardInterrupt
        return original(step, settings)

    monkeypatch.setattr(training, "learning_rate", dying)
    with pytest.raises(KeyboardInterrupt):
        train(work, tmp_path / "killed")
    assert not (tmp_path / "killed").exists()
    assert train(work, tmp_path / "killed") == 0
    assert steps[10:] == list(range(5, 12))
    assert weights(tmp_path / "killed") == weights(undisturbed)


def test_killed_while_the_best_is_measured(work, undisturbed, tmp_path, monkeypatch):
    def dying(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "measure_best", dying)
        with pytest.raises(KeyboardInterrupt):
            train(work, tmp_path / "killed")
    monkeypatch.setattr(training, "learning_rate", dying)  # no step is done again
    assert train(work, tmp_path / "killed") == 0
    assert weights(tmp_path / "killed") == weights(undisturbed)
    results = [yaml.safe_load((p / "config.yaml").read_text())["result"] for p in (tmp_path / "killed", undisturbed)]
    assert results[0] == results[1]


def test_a_signal_saves_and_asks_for_another_turn(work, undisturbed, tmp_path, monkeypatch):
    original = training.learning_rate

    def signalled(step, settings):
        if step == 6:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(step, settings)

    with monkeypatch.context() as patch:
        patch.setattr(training, "learning_rate", signalled)
        assert train(work, tmp_path / "stopped") == EXIT_REQUEUE
    assert not (tmp_path / "stopped").exists()
    assert train(work, tmp_path / "stopped") == 0
    log = (tmp_path / "stopped/train.log").read_text()
    assert "stopped by a signal at step 7" in log and "resuming after step 7" in log
    assert weights(tmp_path / "stopped") == weights(undisturbed)


def test_changed_settings_are_refused_by_name(work, tmp_path, monkeypatch):
    def dying(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "measure_best", dying)
        with pytest.raises(KeyboardInterrupt):
            train(work, tmp_path / "p", "--steps", "2")
    with pytest.raises(UserError, match=r"p\.partial: .*batch_size: 4 -> 3; steps: 2 -> 4\. .*give another --output "):
        train(work, tmp_path / "p", "--steps", "4", "--batch-size", "3")
    (work / "moved").symlink_to(work / "encoder")  # the same encoder elsewhere
    assert train(work, tmp_path / "p", "--steps", "2", "--encoder", str(work / "moved")) == 0


def test_two_trainings_of_one_projector(work, tmp_path, monkeypatch):
    monkeypatch.setattr("sdumc.training.checkpoint.lock_folder.__defaults__", (0.1,))
    refused = pytest.raises(UserError, match=r"projector\.partial: another training works in this folder")
    with hold_folder(training.partial_folder(tmp_path / "projector")), refused:
        train(work, tmp_path / "projector")
    assert train(work, tmp_path / "projector") == 0


def test_a_folder_that_got_its_final_name_while_it_was_waited_for(tmp_path, monkeypatch):
    """The lock that is got at last is in the finished folder; the one that waited makes a folder of its own."""
    real, folder = checkpoint.lock_folder, tmp_path / "new"

    def lock_late(path):
        descriptor = real(path)
        if not (tmp_path / "finished").exists():
            path.rename(tmp_path / "finished")
        return descriptor

    monkeypatch.setattr(checkpoint, "lock_folder", lock_late)
    with hold_folder(folder):
        assert (folder / checkpoint.LOCK).exists()


def test_what_a_warm_start_learns(tmp_path):
    """Frames that are noisy pictures of tokens: CTC finds the tokens, and puts projected frames near their embeddings;
    afterwards the projector alone does the same, and leaves out what is between them."""
    torch.manual_seed(1)
    pictures, embeddings = 3 * torch.randn(6, 8), torch.randn(6, 24)
    projector, normal = Projector(8, 24, 2, 64, Vocabulary(embeddings)), ctc.Normaliser(8)
    normal.mean.fill_(0.5)
    normal.deviation.fill_(3.0)
    optimiser = torch.optim.AdamW(projector.parameters(), lr=5e-3)

    def clip():
        tokens = torch.randperm(6)[:4].tolist()
        frames = torch.zeros(32, 8)
        for place, token in enumerate(tokens):
            frames[8 * place : 8 * place + 2] = pictures[token]
        return frames + 0.3 * torch.randn_like(frames), tokens

    for _ in range(400):
        clips = [clip() for _ in range(8)]
        loss, tokens = ctc.warm_loss(projector, normal([x for x, _ in clips]), [a for _, a in clips], [0, 1])
        optimiser.zero_grad()
        (loss / tokens).backward()
        optimiser.step()
    frames, answer = clip()
    before = project(projector, normal([frames]))[0]
    normal.fold(projector)
    save_projector(tmp_path / "projector.safetensors", projector)
    after = project(load_projector(tmp_path, 8, 24), [frames])[0]
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after, embeddings[answer], atol=0.5, rtol=0.1)
    mixed = project(projector, [frames[:20], frames, frames[:1]])  # in a batch as alone
    torch.testing.assert_close(mixed[1], after, atol=1e-4, rtol=1e-4)
    assert [len(x) for x in mixed] == [3, 4, 0]
    assert len(project(projector, [torch.zeros(8, 8)])[0]) == 1  # nothing but blanks


def test_simulation_follows_the_projector(work, tmp_path):
    """A projector that saw the clip alone is not read with the 30 s of silence that Whisper is used to."""
    whisper = tiny_models.whisper(tmp_path / "whisper")
    options = ("--encoder", str(whisper), "--whisper-window", "clip", "--ctc-steps", "3", "--steps", "1", "--k", "2")
    assert train(work, tmp_path / "projector", *options) == 0
    common = ["--data-dir", work / "data", "--dump-dir", tmp_path, "--encoder", whisper, "--llm", work / "llm"]
    simulated = [*common, "--projector", tmp_path / "projector", "--max-new-tokens", "4", "--device", "cpu"]
    simulate_text.main([*map(str, simulated), "--speech-test", "level"])
    record = json.loads((tmp_path / "ark/text_sim.1.json").read_text())
    assert record["settings"]["whisper_window"] == "clip"


def test_ctc_leaves_out_what_does_not_fit():
    scores = [torch.zeros(4, 3).log_softmax(-1), torch.zeros(2, 3).log_softmax(-1)]
    assert ctc.ctc_loss(scores, [[1, 1, 2], [1, 1]])[1] == 3  # two of the same need a blank between
    loss, tokens = ctc.ctc_loss(scores[1:], [[1, 1]])
    assert (float(loss), tokens) == (0.0, 0)


@pytest.mark.parametrize("moment", [3, 6, 9])
def test_a_warm_start_that_is_killed(work, tmp_path, monkeypatch, moment):
    """Six steps of it, then four through the LLM; killed before, at and after the change, it ends with the same."""
    options = ("--ctc-steps", "6", "--steps", "4", "--checkpoint-interval", "1", "--k", "2")
    assert train(work, tmp_path / "whole", *options) == 0
    calls, original = [], training.learning_rate

    def dying(*arguments):
        calls.append(0)
        if len(calls) == moment:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(training, "learning_rate", dying)
    with pytest.raises(KeyboardInterrupt):
        train(work, tmp_path / "killed", *options)
    assert train(work, tmp_path / "killed", *options) == 0
    assert len(calls) == 11  # one call for each step, and one more for the step that was killed
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert yaml.safe_load((tmp_path / "killed/config.yaml").read_text())["ctc_steps"] == 6


def test_in_parts(work, tmp_path, monkeypatch, caplog):
    """Two clips at once are too many for the memory: the batch goes in parts, with the same gradients."""
    assert train(work, tmp_path / "whole", "--steps", "4") == 0
    original, sizes = training.answer_loss, []

    def small(llm, contexts, answers):
        sizes.append(len(answers))
        if len(answers) > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return original(llm, contexts, answers)

    limit = 1
    monkeypatch.setattr(training, "answer_loss", small)
    with caplog.at_level(logging.WARNING, logger="sdumc"):
        assert train(work, tmp_path / "parts", "--steps", "4") == 0
    assert sizes[:4] == [4, 2, 1, 1]
    a, b = (load_file(tmp_path / name / "projector.safetensors") for name in ("whole", "parts"))
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], atol=1e-4, rtol=1e-3)
    assert "going on with parts of 1" in (tmp_path / "parts/train.log").read_text()
    limit = 0
    with pytest.raises(UserError, match="one utterance alone does not fit"):
        train(work, tmp_path / "none")


# ------------------------------------------------------------------------------------------------------- cross-fitting


def split(folder, parts: int, utt2spk: str, text: str = "", seed: int = 1) -> tuple[dict[str, str], str]:
    """What utils/split_speakers.py makes of the tables: part by utterance, and what it says."""
    folder.mkdir(exist_ok=True)
    (folder / "utt2spk").write_text(utt2spk)
    (folder / "text").write_text(text or "".join(f"{line.split()[0]} words\n" for line in utt2spk.splitlines()))
    script = Path(__file__).parents[2] / "utils/split_speakers.py"
    words = ["--data-dir", folder, "--parts", parts, "--seed", seed, folder / "f/utt2fold"]
    done = subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        return {}, done.stderr
    lines = (folder / "f/utt2fold").read_text().splitlines()
    assert lines == sorted(lines)
    return dict(line.split() for line in lines), done.stdout


def test_parts_have_other_speakers_and_are_balanced(tmp_path):
    sizes = {f"s{i:02d}": 1 + i * i % 11 for i in range(30)}
    utt2spk = "".join(f"{s}-{n} {s}\n" for s, size in sizes.items() for n in range(size))
    part_of, said = split(tmp_path, 5, utt2spk)
    assert len(part_of) == sum(sizes.values())
    assert len({(utt[:3], part) for utt, part in part_of.items()}) == 30
    counts = Counter(part_of.values())
    assert set(counts) == set("12345") and max(counts.values()) - min(counts.values()) <= 2
    assert f"{len(part_of)} utterances of 30 speakers" in said and "warning" not in said
    written = (tmp_path / "f/utt2fold").stat().st_mtime_ns
    assert split(tmp_path, 5, utt2spk)[0] == part_of and split(tmp_path, 5, utt2spk, seed=2)[0] != part_of
    split(tmp_path, 5, utt2spk)
    assert written < (written := (tmp_path / "f/utt2fold").stat().st_mtime_ns)
    split(tmp_path, 5, utt2spk)
    assert written == (tmp_path / "f/utt2fold").stat().st_mtime_ns  # unchanged: nothing is made again


def test_parts_of_strange_sets(tmp_path):
    fewer, _ = split(tmp_path, 5, "a-1 a\na-2 a\nb-1 b\n")
    assert set(fewer.values()) == {"1", "2"} and fewer["a-1"] == fewer["a-2"] != fewer["b-1"]
    one, said = split(tmp_path, 3, "a-1 a\na-2 a\na-3 a\na-4 a\n")
    assert (
        sorted(Counter(one.values()).values()) == [1, 1, 2] and "all are of one speaker: the parts are of utt" in said
    )
    own, said = split(tmp_path, 2, "a a\nb b\nc c\nd d\n")
    assert sorted(Counter(own.values()).values()) == [2, 2] and "each utterance has a speaker of its own" in said
    # Only c's and d's speech is transcribed: without the part of either there is still something to learn from.
    some, _ = split(tmp_path, 4, "a-1 a\nb-1 b\nc-1 c\nc-2 c\nd-1 d\n", "c-1 well\nd-1 no\n")
    assert set(some.values()) == {"1", "2"} and some["c-1"] == some["c-2"] != some["d-1"] and len(some) == 5
    assert split(tmp_path, 4, "a-1 a\n")[0] == {"a-1": "1"}
    assert "warning: one part has 5 of 6" in split(tmp_path, 2, "".join(f"a-{i} a\n" for i in range(5)) + "b-1 b\n")[1]
    for table in ("a-1 a\na-2\n", "a-1 a\n"):
        _, said = split(tmp_path, 2, table, "a-1 yes\na-2 no\n")
        assert "utt2spk: utterance 'a-2' has no speaker" in said


@pytest.fixture(scope="module")
def folds(work, tmp_path_factory):
    """Projectors that have not heard speaker 0 (part 1) and speaker 1 (part 2)."""
    folder = tmp_path_factory.mktemp("cross") / "projector_folds"
    folder.mkdir()
    ids = [line.split()[0] for line in (work / "data/utt2spk").read_text().splitlines()]
    (folder / "utt2fold").write_text("".join(f"{u} {1 + int(u[3])}\n" for u in ids))
    for part in ("1", "2"):
        words = ["--folds", str(folder / "utt2fold"), "--leave-out", part, "--learning-rate", "0.1"]
        assert train(work, folder / part, *words) == 0
    return folder


def test_a_part_is_left_out(work, folds, undisturbed, monkeypatch, capsys):
    ids = (undisturbed / "train_utterances").read_text().split()
    for part in "12":
        learned = (folds / part / "train_utterances").read_text().split()
        assert learned == [u for u in ids if u[3] != str(int(part) - 1)]
        assert yaml.safe_load((folds / part / "config.yaml").read_text())["left_out"] == part
    # What is finished is not trained again, unless its settings have changed; nor is it mistaken for another part's.
    before = weights(folds / "2")
    monkeypatch.setattr(training, "learning_rate", None)
    words = ["--folds", str(folds / "utt2fold"), "--learning-rate", "0.1"]
    assert train(work, folds / "2", *words, "--leave-out", "2") == 0
    assert "there already" in capsys.readouterr().err and weights(folds / "2") == before
    for more in ([*words, "--leave-out", "1"], ["--learning-rate", "0.1"], [*words, "--leave-out", "2", "--seed", "7"]):
        with pytest.raises(TypeError):
            train(work, folds / "2", *more)
        shutil.rmtree(training.partial_folder(folds / "2"))


def test_wrong_parts_are_refused(work, folds, tmp_path):
    for words, message in [
        (["--leave-out", "1"], "--folds and --leave-out belong together"),
        (["--folds", str(folds / "utt2fold"), "--leave-out", "3"], "there is no part 3"),
    ]:
        with pytest.raises(UserError, match=message):
            train(work, tmp_path / "p", *words)


def reading(work, dump, projector, *more: str) -> list[str]:
    models = ["--encoder", str(work / "encoder"), "--llm", str(work / "llm"), "--projector", str(projector)]
    places = ["--data-dir", str(work / "data"), "--dump-dir", str(dump), "--device", "cpu", "--layers", "-2"]
    return [*places, *models, "--batch-size", "3", *more]


def read(work, dump, projector, *more: str) -> dict[str, torch.Tensor]:
    """Simulated and real text of the data by a projector: its states by feature and utterance."""
    for job in ("1/2", "2/2"):
        words = reading(work, dump, projector, "--shard", job, *more)
        simulate_text.main([*words, "--max-new-tokens", "12", "--speech-test", "level"])
        extract_text.main(words)
    for name in ("text", "text_sim"):
        finish_dump.main(["--data-dir", str(work / "data"), "--dump-dir", str(dump), "--name", name, "--num-jobs", "2"])
    found = load_dump(dump).features
    places = {(name, u): at for name in ("text", "text_sim") for u, at in found[name].entries.items()}
    return {key: torch.from_numpy(load_matrix(at)) for key, at in places.items()}


def test_each_part_is_read_by_the_projector_that_has_not_heard_it(work, folds, undisturbed, tmp_path):
    alone = {part: read(work, tmp_path / part, folds / part) for part in "12"}
    crossed = read(work, tmp_path / "crossed", undisturbed, "--projector-folds", str(folds))
    assert len(crossed) == 18
    for (name, utt), states in crossed.items():
        own, other = (alone[p][name, utt] for p in ("12" if utt[3] == "0" else "21"))
        torch.testing.assert_close(states, own, atol=1e-4, rtol=1e-3)
        assert other.shape != states.shape or (other - states).abs().max() > 1e-2
    described = yaml.safe_load((tmp_path / "crossed/text_sim.yaml").read_text())
    assert (described["projector_parts"], described["projector_parts_of"]) == (2, "speakers")
    assert described["projector_saw"] == 0 and described["projector"] == str(undisturbed)  # the one for new clips
    assert yaml.safe_load((tmp_path / "1/text_sim.yaml").read_text())["projector_saw"] == 4


def test_projectors_that_have_heard_what_they_read_are_refused(work, folds, undisturbed, tmp_path):
    words = reading(work, tmp_path / "dump", undisturbed, "--projector-folds", str(tmp_path / "folds"))
    shutil.copytree(folds, tmp_path / "folds")
    for part, source in (("1", "2"), ("2", "1")):
        shutil.copy(folds / source / "train_utterances", tmp_path / "folds" / part)
    with pytest.raises(UserError, match=r"folds/1/projector.safetensors: may have learned from utterance 'spk0-000'"):
        simulate_text.main(words)
    (tmp_path / "folds/utt2fold").write_text("spk0-000 1\n")
    with pytest.raises(UserError, match=r"utt2fold: utterance 'spk0-002' of .* has no part; run stage 2 again"):
        simulate_text.main(words)
