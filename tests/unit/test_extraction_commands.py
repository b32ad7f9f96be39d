"""Stage 2 and 3 commands on tiny models: outputs, resuming, failures and their fallbacks."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from helpers import tiny_models
from test_features import make_clip, video_data_dir

from sdumc import machine
from sdumc.bin import extract_audio, extract_text, extract_video, finish_dump, recognize, simulate_text
from sdumc.data.dump import load_dump, load_matrix
from sdumc.data.kaldi_dir import load_kaldi_dir
from sdumc.data.shards import ShardWriter
from sdumc.errors import UserError
from sdumc.extraction import loop
from sdumc.extraction.loop import make_batches
from sdumc.extraction.simulation import Search, simulate
from sdumc.machine import installed_versions
from sdumc.prediction.extractors import Extractors, load_record
from sdumc.pretrained.projector import Projector, save_projector
from sdumc.pretrained.quality import from_numbers
from sdumc.pretrained.recogniser import load_recogniser
from sdumc.pretrained.speech import SpeechReader


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    root = tmp_path_factory.mktemp("work")
    tiny_models.wavlm(root / "encoder")
    tiny_models.wavlm(root / "ctc", ctc=True)
    tiny_models.llama(root / "llm", eos_bias=0.7, seed=1)
    torch.manual_seed(0)
    projector = Projector(encoder_dim=32, llm_dim=48, k=5, hidden=16)
    projector.linear2.weight.data *= 5  # loud enough for every clip to get another answer
    save_projector(root / "projector.safetensors", projector)
    tiny_models.data_dir(root / "data", [0.5, 1.3, 0.9, 0.7, 1.1, 0.6, 0.8, 1.0, 0.4])
    return root


# The clips are noise, in which the detector of speech rightly finds none.
NOISE = ["--speech-test", "level"]


def common(work, dump, *more):
    return ["--data-dir", str(work / "data"), "--dump-dir", str(dump), "--device", "cpu", "--batch-size", "3", *more]


def simulation(work, dump, *more):
    models = ["--encoder", "encoder", "--projector", "projector.safetensors", "--llm", "llm"]
    models = [str(work / m) if not m.startswith("--") else m for m in models]
    return common(work, dump, *models, "--layers", "-2", "--max-new-tokens", "12", *NOISE, *more)


def finish(work, dump, name, jobs_=1):
    finish_dump.main(
        ["--data-dir", str(work / "data"), "--dump-dir", str(dump), "--name", name, "--num-jobs", str(jobs_)]
    )


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")}


def test_whole_stage_2_and_3(work, tmp_path):
    dump = tmp_path / "dump"
    for job in ("1/2", "2/2"):
        recognize.main(common(work, dump, "--model", str(work / "ctc"), "--shard", job, *NOISE))
    finish(work, dump, "asr_hyp", 2)
    for job in ("1/2", "2/2"):
        simulate_text.main(simulation(work, dump, "--shard", job))
        extract_audio.main(common(work, dump, "--model", str(work / "encoder"), "--layer", "-2", "--shard", job))
    finish(work, dump, "text_sim", 2)
    finish(work, dump, "audio", 2)
    for name in ("text", "text_asr"):
        options = ["--name", name, "--text", str(work / "data" / name)]
        arguments = [a for a in simulation(work, dump, *options) if a not in ("--max-new-tokens", "12", *NOISE)]
        extract_text.main(arguments)
        finish(work, dump, name)
    found = load_dump(dump)
    assert len(found.utterances) == 9
    assert set(found.features) >= {"audio", "text", "text_sim", "text_asr"}
    texts = dict(line.split(" ", 1) for line in (work / "data/text").read_text().splitlines())
    for utt, words in texts.items():
        assert found.features["text"].frames[utt] == len(words.split())  # one token per word, first state dropped
        assert abs(found.features["audio"].frames[utt] - 50 * tiny_seconds(work, utt)) < 3
    assert not (dump / "asr_hyp.scp").exists()
    for name in ("text_sim", "text_asr"):
        quality = json.loads((dump / f"{name}.quality.json").read_text())
        assert quality["n"] == 9
        assert sum(quality["counts"].values()) == 9
        assert quality["wer"] > 0
        assert len((work / "data" / name).read_text().splitlines()) == 9
    status = (dump / "text_sim.status.tsv").read_text().splitlines()
    assert status[0].split("\t") == ["utt_id", "status", "fallback", "log_probability", "raw"]
    sure = [float(row.split("\t")[3]) for row in status[1:] if row.split("\t")[1] in ("ok", "limit")]
    likely = json.loads((dump / "text_sim.quality.json").read_text())["log_probability"]
    assert likely["n"] == len(sure) >= 3 and likely["mean"] == pytest.approx(np.mean(sure), abs=1e-3)
    assert (
        min(sure) - 1e-3 <= likely["p1"] <= likely["p50"] == pytest.approx(np.median(sure), abs=1e-3) and max(sure) < 0
    )
    assert len(status) == 10
    described = yaml.safe_load((dump / "text_sim.yaml").read_text())
    assert described["layers"] == [-2]
    assert described["prompt"] == "Transcribe speech to text. "
    assert described["prompt_template"] == "released"
    assert described["dim"] == 48
    assert described["log_probability"] == likely and "sound" not in described  # nine clips are too few
    assert described["versions"] == described["asr"]["versions"] == installed_versions()
    assert (dump / "utt2label").read_bytes() == (work / "data/utt2label").read_bytes()


def test_sound_unlike_the_train_set_s_is_found(work, tmp_path):
    """From stage 2 to what predict asks: noise and higher tones are strange, the train set's own clips are not."""
    tiny_models.data_dir(tmp_path / "data", [0.4 + 0.02 * i for i in range(60)])
    models = ["--encoder", "encoder", "--projector", "projector.safetensors", "--llm", "llm"]
    models = [str(work / m) if not m.startswith("--") else m for m in models]
    folders = ["--data-dir", str(tmp_path / "data"), "--dump-dir", str(tmp_path / "dump")]
    simulate_text.main([*folders, *models, "--device", "cpu", "--max-new-tokens", "3", "--beam", "1", *NOISE])
    finish_dump.main([*folders, "--name", "text_sim"])
    described = yaml.safe_load((tmp_path / "dump/text_sim.yaml").read_text())
    (tmp_path / "extractors.yaml").write_text(yaml.safe_dump({"text_sim": described}))
    extractors = Extractors(load_record(tmp_path))

    def strange(waves):
        return [extractors.strange_sound("text_sim", s.sound) for s in extractors.simulated_text(waves)]

    own = [tiny_models.wave(0.4 + 0.02 * i, i) for i in range(60)]
    assert sum(strange(own)) <= 1
    rng, t = np.random.default_rng(0), np.arange(16000) / 16000
    others = [0.3 * rng.standard_normal(16000), np.sin(2 * np.pi * 1500 * t), np.sign(np.sin(2 * np.pi * 90 * t))]
    assert all(strange([x.astype(np.float32) for x in others]))

    whole = described.pop("sound")  # a record of an earlier version
    (tmp_path / "extractors.yaml").write_text(yaml.safe_dump({"text_sim": described}))
    assert not Extractors(load_record(tmp_path)).strange_sound("text_sim", np.full(32, 1e9))
    damaged = {"text_sim": {**described, "sound": {**whole, "mean": "1 2 three"}}}
    (tmp_path / "extractors.yaml").write_text(yaml.safe_dump(damaged))
    with pytest.raises(UserError, match="`sound` of text_sim is damaged"):
        Extractors(load_record(tmp_path)).strange_sound("text_sim", np.zeros(32))


def tiny_seconds(work, utt):
    lines = (work / "data/utt2dur").read_text().splitlines()
    return float(dict(line.split() for line in lines)[utt])


def test_real_text_equals_simulated_text_of_the_same_words(work, tmp_path):
    """The same words behind the same sound have the same states, whichever command made them."""
    dump = tmp_path / "dump"
    simulate_text.main(simulation(work, dump))
    finish(work, dump, "text_sim")
    written = work / "data" / "text_sim"
    arguments = simulation(work, dump, "--name", "text_asr", "--text", str(written))
    extract_text.main([a for a in arguments if a not in ("--max-new-tokens", "12", *NOISE)])
    finish(work, dump, "text_asr")
    found = load_dump(dump)
    from sdumc.data.dump import load_matrix

    compared = 0
    rows = [r.split("\t") for r in (dump / "text_sim.status.tsv").read_text().splitlines()[1:]]
    for utt, status, *_ in rows:
        a = load_matrix(found.features["text_sim"].entries[utt])
        b = load_matrix(found.features["text_asr"].entries[utt])
        if status in ("ok", "limit") and len(b) - len(a) == (status == "limit"):
            np.testing.assert_allclose(a, b[: len(a)], atol=1e-4)
            compared += 1
    assert compared >= 3


def test_a_recogniser_helps_to_choose(work, tmp_path):
    """Almost alone: then the most probable of the beam by the recogniser is written, and its states are kept."""
    plain, helped = tmp_path / "plain", tmp_path / "helped"
    few = ["--max-new-tokens", "3"]  # whose letters have room in the frames of these clips
    simulate_text.main(simulation(work, plain, *few))
    finish(work, plain, "text_sim")
    alone = (work / "data/text_sim").read_text().splitlines()
    simulate_text.main(simulation(work, helped, *few, "--rescorer", str(work / "ctc"), "--rescore-weight", "0.999"))
    finish(work, helped, "text_sim")
    described = yaml.safe_load((helped / "text_sim.yaml").read_text())
    assert described["rescorer"] == str(work / "ctc") and described["rescore_weight"] == 0.999
    assert "rescorer" not in yaml.safe_load((plain / "text_sim.yaml").read_text())
    written = (work / "data/text_sim").read_text().splitlines()
    recogniser = load_recogniser(str(work / "ctc"))
    data = load_kaldi_dir(work / "data")
    differ = 0
    for before, after in zip(alone, written, strict=True):
        utt, *words = after.split(" ", 1)
        if before != after:
            differ += 1
            texts = [before.split(" ", 1)[1] if " " in before else "", *words]
            (scores,) = recogniser.log_probabilities([loop.read_wave(data, utt)], [texts])
            assert scores[1] > scores[0]
    assert differ >= 3
    with pytest.raises(UserError, match="no recogniser"):
        simulate_text.main(simulation(work, tmp_path / "other", "--rescorer", str(work / "llm")))
    with pytest.raises(SystemExit):
        simulate_text.main(simulation(work, helped, "--rescorer", str(work / "ctc"), "--rescore-weight", "1"))


@pytest.mark.parametrize("name", ["simulate", "audio", "recognize", "text"])
def test_killed_job_goes_on_to_identical_files(work, tmp_path, monkeypatch, name):
    command, arguments = {
        "simulate": (simulate_text, lambda d: simulation(work, d)),
        "audio": (extract_audio, lambda d: common(work, d, "--model", str(work / "encoder"), "--layer", "1")),
        "recognize": (recognize, lambda d: common(work, d, "--model", str(work / "ctc"), *NOISE)),
        "text": (extract_text, lambda d: simulation(work, d)[:-4]),
    }[name]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    calls, commit = [], ShardWriter.commit

    def snapshot(self):
        commit(self)
        calls.append(self.directory)
        if len(calls) == 2:  # the disk as a SIGKILL just now would leave it, with half a matrix behind
            shutil.copytree(self.directory, killed)
            with open(killed / "ark" / self.partial.name, "ab") as f:
                f.write(b"half a matrix")

    monkeypatch.setattr(ShardWriter, "commit", snapshot)
    command.main(arguments(whole))
    assert len(calls) >= 3
    monkeypatch.setattr(ShardWriter, "commit", commit)
    assert any(n.endswith(".journal") for n in contents(killed))
    seen = []
    original = loop.read_wave
    for module in ("simulation", "features"):
        monkeypatch.setattr(
            f"sdumc.extraction.{module}.read_wave", lambda data, utt: seen.append(utt) or original(data, utt)
        )
    command.main(arguments(killed))
    assert len(seen) == 3  # only what was not committed
    assert contents(whole) == contents(killed)
    before = contents(killed)
    command.main(arguments(killed))  # finished work is left alone
    assert contents(killed) == before


class FakeLLM:
    """Stands in for the LLM: writes prepared texts, one token per word; states say which token they belong to."""

    def __init__(self, texts, ended=True):
        self.texts, self.ended = texts, ended

    def transcribe(self, contexts, *_):
        from sdumc.pretrained.llm import Transcript

        found = []
        for text in self.texts:
            tokens = text.split()
            states = torch.arange(len(tokens) + 1.0)[:, None].expand(-1, 2)
            found.append(Transcript(tokens, text, self.ended, states))
        return found

    def decode(self, tokens):
        return " ".join(tokens)

    def answer_ids(self, text):
        return text.split()

    def encode(self, contexts, answers):
        return [torch.full((len(a) + 1, 2), -1.0) for a in answers]


class FakeReader(SpeechReader):
    def __init__(self, llm):
        super().__init__(lambda waves: [torch.ones(3, 8) for _ in waves], None, llm)

    def contexts_of(self, frames):
        return list(frames)


def test_failures_are_replaced():
    texts = ["all is well", "I am an AI language model", "", "", "go " + "round " * 30]
    reader = FakeReader(FakeLLM(texts))
    asr = [None, "spoken words here", "heard", "", None]
    waves = [tiny_models.wave(0.3, i) for i in range(5)]
    results = simulate(reader, waves, asr, Search())
    assert [r.status for r in results] == ["ok", "refusal", "empty", "empty", "repeat"]
    assert [r.fallback for r in results] == ["none", "asr", "asr", "prompt", "cut"]
    assert [r.text for r in results] == ["all is well", "spoken words here", "heard", "", "go round"]
    assert [len(r.states) for r in results] == [3, 3, 1, 1, 2]
    assert results[0].states[:, 0].tolist() == [1, 2, 3]  # the first state is dropped
    assert results[3].states[:, 0].tolist() == [0]  # the prompt's end
    assert results[4].states[:, 0].tolist() == [1, 2]
    kept = simulate(reader, waves, asr, Search(), keep_first=True)
    assert [len(r.states) for r in kept] == [4, 4, 2, 1, 3]


def test_a_clip_without_speech_gives_no_opinion():
    """The LLM would write one; neither that nor the recogniser's guess is used."""
    reader = FakeReader(FakeLLM(["all is well"]))
    noise = tiny_models.wave(0.5)
    waves = [noise, np.zeros(8000, np.float32), noise, 1e-4 * noise]
    results = simulate(reader, waves, [None, "thank you"] * 2, Search(), no_speech=[False, False, True, False])
    assert [r.status for r in results] == ["ok", "no-speech", "no-speech", "no-speech"]
    assert [r.text for r in results] == ["all is well", "", "", ""]
    assert [(r.fallback, r.raw, len(r.states)) for r in results[1:]] == [("prompt", "", 1)] * 3
    assert all(float(r.states[0, 0]) == -1 for r in results[1:])  # of a pass without an answer


def test_noise_gives_no_opinion_by_either_command(work, tmp_path):
    """What the recogniser and the LLM would write for it is in the other tests: with --speech-test level."""
    dump = tmp_path / "dump"
    recognize.main(common(work, dump, "--model", str(work / "ctc")))
    finish(work, dump, "asr_hyp")
    simulate_text.main([a for a in simulation(work, dump) if a not in NOISE])
    finish(work, dump, "text_sim")
    for name in ("text_asr", "text_sim"):
        quality = json.loads((dump / f"{name}.quality.json").read_text())
        assert quality["counts"]["no-speech"] == quality["n"] == 9 and "log_probability" not in quality
        assert set((work / "data" / name).read_text().split()) == set(load_dump(dump, ["text_sim"]).utterances)
    assert set(load_dump(dump, ["text_sim"]).features["text_sim"].frames.values()) == {1}


def test_out_of_memory_halves_the_batch(caplog):
    sizes = []

    def work_(items):
        sizes.append(len(items))
        if len(items) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return [i * 2 for i in items]

    assert machine.halve_when_out_of_memory(list(range(10)), work_) == [2 * i for i in range(10)]
    assert sizes == [10, 5, 3, 2, 5, 3, 2]
    assert "batches of 5" in caplog.text

    def never(items):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(UserError, match=r"^utterance 'u1' alone does not fit"):
        machine.halve_when_out_of_memory(["u1"], never)


@pytest.mark.parametrize("name", ["audio", "recognize", "simulate", "text", "video"])
def test_every_command_goes_on_when_the_gpu_s_memory_is_too_small(work, tmp_path, monkeypatch, capsys, name):
    """Two at once are too many: each command says so, halves the batch, and writes what it would have written."""
    from sdumc.pretrained.llm import SpeechLLM
    from sdumc.pretrained.recogniser import CtcRecogniser
    from sdumc.pretrained.speech import SpeechEncoder
    from sdumc.pretrained.vision import VisionExtractor

    target, method, command, arguments = {
        "audio": (SpeechEncoder, "__call__", extract_audio, ["--model", str(work / "encoder"), "--layer", "1"]),
        "recognize": (CtcRecogniser, "hear", recognize, ["--model", str(work / "ctc"), *NOISE]),
        "simulate": (SpeechLLM, "transcribe", simulate_text, simulation(work, tmp_path)[8:]),
        "text": (SpeechLLM, "encode", extract_text, simulation(work, tmp_path)[8:-4]),
        "video": (VisionExtractor, "_vectors", extract_video, ["--fps", "5"]),
    }[name]
    if name == "video":
        clips = {f"s0-{i}": make_clip(tmp_path / f"{i}.mp4", 1.0, i) for i in range(2)}
        data = video_data_dir(tmp_path / "data", clips)
        arguments += ["--model", str(tiny_models.vit(tmp_path / "vit"))]
    else:
        data = work / "data"
    original, sizes = getattr(target, method), []

    def small(self, items, *rest, **options):
        sizes.append(len(items))
        if len(items) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return original(self, items, *rest, **options)

    base = ["--data-dir", str(data), "--device", "cpu", "--batch-size", "3", *arguments]
    command.main([*base, "--dump-dir", str(tmp_path / "whole")])
    monkeypatch.setattr(target, method, small)
    command.main([*base, "--dump-dir", str(tmp_path / "halved")])
    assert max(sizes) > 1 and sizes.count(1) >= 9 - 7 * (name == "video")
    said = capsys.readouterr().err
    assert "out of GPU memory with" in said and "going on with batches of" in said
    (manifest,) = (tmp_path / "halved" / "ark").glob("*.1.json")
    halved, whole = (json.loads((tmp_path / d / "ark" / manifest.name).read_text()) for d in ("halved", "whole"))
    for notes, others in zip(halved["notes"].values(), whole["notes"].values(), strict=True):
        if "sound" in notes:  # rounded numbers; another batch changes the last digit of some
            apart = from_numbers(notes.pop("sound")) - from_numbers(others.pop("sound"))
            assert np.abs(apart).max() < 1e-3
    assert halved["frames"] == whole["frames"] and halved["notes"] == whole["notes"]
    for utt in whole["scp"]:
        ark = f"ark/{manifest.name.removesuffix('.json')}.ark"
        a, b = (load_matrix(f"{tmp_path / d / ark}:{m['scp'][utt]}") for d, m in (("whole", whole), ("halved", halved)))
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_batches_are_fixed_and_bounded():
    seconds = {f"u{i}": float(i % 7 + 1) for i in range(40)}
    batches = make_batches(seconds, 8, 20)
    assert sorted(u for b in batches for u in b) == sorted(seconds)
    assert batches == make_batches(dict(reversed(seconds.items())), 8, 20)
    for batch in batches:
        assert len(batch) <= 8
        assert len(batch) == 1 or len(batch) * max(seconds[u] for u in batch) <= 20


def test_unreadable_media(work, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(work / "data", data)
    bad = data / "bad.wav"
    bad.write_bytes(b"RIFF")
    scp = (data / "wav.scp").read_text().splitlines()
    utt = scp[4].split()[0]
    scp[4] = f"{utt} {bad}"
    (data / "wav.scp").write_text("\n".join(scp) + "\n")
    arguments = ["--data-dir", str(data), "--model", str(work / "encoder"), "--layer", "1", "--device", "cpu"]
    with pytest.raises(UserError, match=r"bad\.wav"):
        extract_audio.main([*arguments, "--dump-dir", str(tmp_path / "a")])
    extract_audio.main([*arguments, "--dump-dir", str(tmp_path / "b"), "--bad-media", "absent"])
    join = ["--data-dir", str(data), "--dump-dir", str(tmp_path / "b"), "--name", "audio"]
    with pytest.raises(UserError, match=rf"1 of 9 utterances \(11\.1%\) could not be read.*{utt}.*--max-drop"):
        finish_dump.main(join)
    assert not (tmp_path / "b" / "audio.scp").exists()
    finish_dump.main([*join, "--max-drop", "0.2"])
    assert (tmp_path / "b" / "audio.absent").read_text().startswith(f"{utt} ")
    assert set(load_dump(tmp_path / "b").features["audio"].absent) == {utt}


def test_more_jobs_than_utterances(work, tmp_path):
    for job in range(1, 12):
        extract_audio.main(
            common(work, tmp_path, "--model", str(work / "encoder"), "--shard", f"{job}/11", "--layer=1")
        )
    finish(work, tmp_path, "audio", 11)
    assert len(load_dump(tmp_path).features["audio"].entries) == 9
