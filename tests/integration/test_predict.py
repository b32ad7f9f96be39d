"""Predicting for single files equals decoding the set they are in; packed models do the same elsewhere."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from helpers import shared
from helpers.browser import Tab, find_browser
from helpers.commands import call_here
from helpers.stopping import wait_until
from helpers.tiny_recipe import ENV, ROOT, SMALL, clip, make_recipe, predictions

from sdumc import Scorer
from sdumc.bin import pack, predict
from sdumc.data.dump import load_dump, load_matrix
from sdumc.data.media import read_audio
from sdumc.data.tables import MediaSpan, read_table
from sdumc.errors import UserError
from sdumc.extraction.simulation import simulate
from sdumc.prediction.scorer import overall_score
from sdumc.pretrained.quality import Sounds
from sdumc.pretrained.recogniser import Heard


@pytest.fixture(scope="module")
def exp(tmp_path_factory):
    root = tmp_path_factory.mktemp("recipe").resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        return make_recipe(root)


@pytest.fixture(scope="module")
def scorer(exp):
    return Scorer.load(exp, device="cpu")


@pytest.fixture(scope="module")
def clips(exp):
    return {p.stem: p for p in sorted((exp.parents[1] / "data/all/clips").iterdir())}


@pytest.fixture(scope="module")
def packed(exp, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    pack.main(["--exp-dir", str(exp), "--output", str(folder / "tiny.tar")])
    return folder / "tiny.tar"


def run(capsys, *args: object) -> tuple[int, str, str]:
    code = predict.main([*map(str, args), "--device", "cpu"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_features_are_those_of_the_recipe(exp, scorer, clips, monkeypatch):
    monkeypatch.chdir(exp.parents[1])
    dump = load_dump("dump/all")
    made = {n: {u: load_matrix(e) for u, e in f.entries.items()} for n, f in dump.features.items()}
    extract = scorer.extractors
    texts = read_table(exp.parents[1] / "data/all/text")
    simulated = read_table(exp.parents[1] / "data/all/text_sim")
    for utt, path in clips.items():
        wave = read_audio(path)
        (words,) = extract.simulated_text([wave])
        assert words.text == simulated[utt]
        found = {
            "audio": extract.audio([wave])[0],
            "text_sim": words.states,
            "text": extract.real_text([texts[utt]], [wave])[0],
            "video": extract.video(MediaSpan(str(path)))[0],
        }
        for name, x in found.items():
            np.testing.assert_allclose(x.numpy(), made[name][utt], atol=1e-4, err_msg=f"{utt} {name}")


def test_scores_are_those_of_decoding(exp, scorer, clips):
    decoded = predictions(exp, "missing")
    assert np.ptp(list(decoded.values())) > 0.3  # or the comparison would say nothing
    for utt, path in clips.items():
        scored = scorer.score(path)
        (only,) = scored.utterances
        assert scored.overall == pytest.approx(only.score)
        assert only.score == pytest.approx(decoded[utt], abs=1e-4)
        assert only.modalities == ("audio", "text", "video") and only.text == "simulated"
        assert (only.start, only.end) == (0, pytest.approx(scored.duration))


def test_text_that_is_far_less_likely_than_the_train_set_s_is_flagged(exp, clips, capsys, tmp_path, monkeypatch):
    """Below the first percentile of the train set's mean log-probabilities, which extractors.yaml and packs carry."""
    pack.main(["--exp-dir", str(exp), "--output", str(tmp_path / "tiny")])
    record = yaml.safe_load((tmp_path / "tiny/extractors.yaml").read_text())
    quality = json.loads((exp.parents[1] / "dump/all/text_sim.quality.json").read_text())
    assert record["text_sim"]["log_probability"] == quality["log_probability"]
    scorer = Scorer.load(tmp_path / "tiny", device="cpu")
    rows = (exp.parents[1] / "dump/all/text_sim.status.tsv").read_text().splitlines()[1:]
    sure = {utt: float(p) for utt, _, _, p, _ in (row.split("\t") for row in rows)}
    assert len(set(sure.values())) > 2  # or the comparison would say nothing
    middle = float(np.median(list(sure.values())))
    scorer.extractors.record.features["text_sim"]["log_probability"]["p1"] = middle
    for utt, path in clips.items():
        scored = scorer.score(path)
        (only,) = scored.utterances
        assert only.log_probability == pytest.approx(sure[utt], abs=2e-3)
        if abs(sure[utt] - middle) > 2e-3:
            assert only.unlikely == (sure[utt] < middle) == any("less likely" in n for n in scored.notes)
    record["text_sim"]["log_probability"]["p1"] = 0.0
    (tmp_path / "tiny/extractors.yaml").write_text(yaml.safe_dump(record))
    assert run(capsys, "--exp-dir", tmp_path / "tiny", clips["spk0-002"])[0] == 0
    code, out, _ = run(capsys, "--exp-dir", tmp_path / "tiny", clips["spk0-002"], "--json")
    assert code == 0 and json.loads(out)["files"][0]["utterances"][0]["unlikely"] is True


def test_sound_unlike_the_train_set_s_is_said(exp, clips, capsys, tmp_path):
    """By a note, in the table and in JSON; a record that knows nothing of it says nothing."""
    pack.main(["--exp-dir", str(exp), "--output", str(tmp_path / "tiny")])
    record = yaml.safe_load((tmp_path / "tiny/extractors.yaml").read_text())
    assert "sound" not in record["text_sim"]  # its train set is too small
    clip_, code = clips["spk0-002"], 0
    for limit in (None, 1e9, 0.0):
        if limit is not None:
            record["text_sim"]["sound"] = Sounds(np.zeros(32), np.eye(32), limit).as_dict()
            (tmp_path / "tiny/extractors.yaml").write_text(yaml.safe_dump(record))
        code, out, _ = run(capsys, "--exp-dir", tmp_path / "tiny", clip_, "--json")
        (file,) = json.loads(out)["files"]
        assert code == 0 and file["utterances"][0]["strange_sound"] is (limit == 0.0)
        assert any("less like the train set" in note for note in file["notes"]) is (limit == 0.0)
    _, out, _ = run(capsys, "--exp-dir", tmp_path / "tiny", clip_)
    assert "strange sound)" in out


def test_a_transcript_takes_the_complete_flow(exp, scorer, clips):
    texts, decoded = read_table(exp.parents[1] / "data/all/text"), predictions(exp, "full")
    for utt in list(clips)[:2]:
        (only,) = scorer.score(clips[utt], texts[utt]).utterances
        assert only.score == pytest.approx(decoded[utt], abs=1e-4)
        assert only.text == "real" and only.transcript == texts[utt] and only.status is None


def test_no_sound_track_means_pictures_alone(exp, scorer, clips, tmp_path):
    import av

    silent = tmp_path / "silent.mp4"
    source = clips["spk0-002"]
    with av.open(str(source)) as a, av.open(str(silent), "w") as b:
        track = a.streams.video[0]
        copy = b.add_stream_from_template(track)
        for packet in a.demux(track):
            if packet.dts is not None:
                packet.stream = copy
                b.mux(packet)
    scored = scorer.score(silent)
    (only,) = scored.utterances
    assert only.modalities == ("video",) and only.text is None
    assert only.score == pytest.approx(predictions(exp, "video")["spk0-002"], abs=1e-4)
    assert "no sound track" in scored.notes[0]


def test_no_pictures_means_sound_alone(exp, scorer, clips, tmp_path):
    soundfile.write(tmp_path / "a.wav", read_audio(clips["spk0-002"]), 16000, subtype="FLOAT")
    (only,) = scorer.score(tmp_path / "a.wav").utterances
    assert only.modalities == ("audio", "text")


def test_silence_and_what_is_not_media(scorer, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(16000), 16000)
    with pytest.raises(UserError, match="silence"):
        scorer.score(tmp_path / "silence.wav")
    (tmp_path / "x.mp4").write_text("not a film")
    with pytest.raises(UserError, match=r"x\.mp4"):
        scorer.score(tmp_path / "x.mp4")
    from PIL import Image

    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (64, 48), "red").save(tmp_path / name)
        with pytest.raises(UserError, match="a single picture without sound"):
            scorer.score(tmp_path / name)
    with pytest.raises(UserError, match="no such media file"):
        scorer.score(tmp_path / "nothing.mp4")
    with pytest.raises(UserError, match="without times"):
        scorer.score(tmp_path / "silence.wav", "some words", cut="yes")


def test_a_long_file_is_cut(scorer, tmp_path, monkeypatch):
    from sdumc.prediction import scorer as module

    long = clip(tmp_path / "long.mp4", 6.0, 3)
    assert len(scorer.score(long).utterances) == 1  # not longer than 20 s
    monkeypatch.setattr(module, "cut_speech", lambda wave, seconds: [(0.2, 1.5), (2.0, 4.5), (5.0, 5.9)])
    steps = []
    scored = scorer.score(long, max_seconds=3, progress=lambda done, total: steps.append((done, total)))
    assert [(u.start, u.end) for u in scored.utterances] == [(0.2, 1.5), (2.0, 4.5), (5.0, 5.9)]
    assert scored.overall == pytest.approx(overall_score(scored.utterances))
    assert steps == [(3, 3)]
    # A segment alone scores the same: no utterance depends on its neighbours.
    monkeypatch.setattr(module, "cut_speech", lambda wave, seconds: [(2.0, 4.5)])
    assert scorer.score(long, cut="yes").overall == pytest.approx(scored.utterances[1].score, abs=1e-4)
    monkeypatch.setattr(module, "cut_speech", lambda wave, seconds: [])
    scored = scorer.score(long, cut="yes", max_seconds=2.5)
    assert [u.modalities for u in scored.utterances] == [("video",)] * 3
    assert "no speech" in scored.notes[0]


def test_a_page_for_all_files(capsys, exp, clips, tmp_path):
    """With attention over each modality and the tokens; a file that fails is named on it."""
    names = [clips["spk0-000"], clips["spk1-001"], tmp_path / "none.mp4"]
    code, out, _ = run(capsys, "--exp-dir", exp, *names, "--html", tmp_path / "pages.html")
    page = (tmp_path / "pages.html").read_text()
    assert code == 1 and "spk1-001.mp4" in out
    assert page.count("<video") == 2 and "none.mp4 could not be scored" in page
    assert [page.count(f"over {what} of utterance 1") for what in ("audio", "simulated text", "video")] == [2, 2, 2]
    assert "--w: " in page  # the tokens of the words are known
    code, _, _ = run(capsys, "--exp-dir", exp, clips["spk0-000"], "--text", "so good", "--html", tmp_path / "pages")
    assert code == 0 and "attention of seven queries over real text" in (tmp_path / "pages/spk0-000.html").read_text()


@pytest.fixture(scope="module")
def site(exp, tmp_path_factory):
    """`sdumc demo` in a process of its own: its address, and the folder for its temporary files."""
    folder = tmp_path_factory.mktemp("demo")
    words = ["demo", "--exp-dir", str(exp), "--device", "cpu", "--port", "0"]
    with subprocess.Popen(
        [sys.executable, "-m", "sdumc", *words],
        env={**ENV, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None and server.stderr is not None
        address = server.stdout.readline().split()[0]
        yield address, folder
        server.terminate()
        assert server.wait(300) == 0 and server.stderr.read() == ""
    assert not list(folder.glob("sdumc-demo-*"))  # a signal too removes what is temporary


@pytest.mark.parametrize("given", [False, True])
def test_the_demo_says_what_predict_says(site, scorer, clips, given):
    address, folder = site
    words = b"the film was good"
    headers = {"X-Sdumc-Name": "mine.mp4", "X-Sdumc-Text-Bytes": str(len(words) if given else 0)}
    content = (words if given else b"") + clips["spk1-001"].read_bytes()
    with urllib.request.urlopen(urllib.request.Request(f"{address}/clips", content, headers)) as reply:
        job = f"{address}/clips/{json.load(reply)['job']}"

    def state() -> dict:
        with urllib.request.urlopen(job) as reply:
            return json.load(reply)

    wait_until(lambda: state()["state"] not in ("waiting", "running"))
    assert state()["state"] == "done", state()
    with urllib.request.urlopen(f"{job}/page") as reply:
        page = reply.read().decode()
    scored = scorer.score(clips["spk1-001"], words.decode() if given else None)
    expected = f"{scored.overall:+.2f}".replace("-", "−")
    assert ('<span class="soft">given</span>' in page) == given
    assert f"<b>{expected}</b>" in page and "<h1>mine.mp4</h1>" in page and 'src="data:video/mp4' in page
    assert [p.name for p in folder.glob("sdumc-demo-*/*")] == ["lock"]


@pytest.mark.slow
@pytest.mark.browser
def test_a_clip_is_dropped_on_the_demo(site, clips, tmp_path):
    """A real one, where there are any: MPEG, which browsers do not play."""
    program = find_browser()
    if program is None:
        pytest.skip("no chromium; `tests/run.sh --with-browser` gets it")
    address, _ = site
    dropped = next(shared.MEDIA.glob("*.mpg"), clips["spk0-000"])
    broken = tmp_path / f"broken{dropped.suffix}"
    broken.write_bytes(b"x" + dropped.read_bytes()[:3000])
    with Tab(program, tmp_path / "profile") as tab:
        tab.open(address)
        tab.drop("#drop", broken)
        assert tab.wait("document.getElementById('error').textContent").startswith(broken.name)
        tab.drop("#drop", dropped)
        tab.wait("!document.getElementById('answer').hidden || document.getElementById('error').textContent")
        assert tab.js("document.getElementById('status').textContent") == f"{dropped.name}: done"
        tab.open(tab.js("document.getElementById('open').href"))
        tab.wait("document.querySelector('video').readyState >= 2")
        assert float(tab.js("document.querySelector('.overall b').textContent").replace("−", "-"))
        assert not tab.problems


def test_subtitles_give_words_and_times(scorer, capsys, exp, tmp_path):
    clip(tmp_path / "film.mp4", 3.0, 4)
    (tmp_path / "film.srt").write_text(
        "1\n00:00:00,200 --> 00:00:01,300\nthe film was good.\n\n2\n00:00:01,500 --> 00:00:09,000\nso bad\n"
    )
    code, out, _ = run(
        capsys, "--exp-dir", exp, tmp_path / "film.mp4", "--text", tmp_path / "film.srt", "--subtitles", "vtt", "--json"
    )
    found = json.loads(out)["files"][0]["utterances"]
    assert code == 0
    assert [u["transcript"] for u in found] == ["the film was good.", "so bad"]
    assert [u["start"] for u in found] == [0.2, 1.5] and found[1]["end"] < 3.3
    written = (tmp_path / "film.sdumc.vtt").read_text()
    assert f"[{found[0]['score']:+.1f}] the film was good." in written


def test_a_refusal_is_replaced_as_in_the_recipe(scorer, clips, monkeypatch):
    from sdumc.prediction import extractors as module

    def refusing(reader, waves, texts, search, keep, **options):
        results = simulate(reader, waves, texts, search, keep, **options)
        for r, text in zip(results, texts, strict=True):
            r.fallback, r.text = ("prompt", "") if text is None else ("asr", text)
        return results

    monkeypatch.setattr(module, "simulate", refusing)
    (result,) = scorer.extractors.simulated_text([read_audio(clips["spk0-002"])])
    heard = read_table(Path(scorer.extractors.record.folder).parents[1] / "data/all/text_asr", allow_empty=True)
    assert result.fallback == "asr" and result.text == heard["spk0-002"]


def test_whisper_is_asked_whether_anybody_speaks(scorer, clips, monkeypatch):
    """As in the recipe, before the LLM; a CTC model cannot tell."""
    monkeypatch.setitem(scorer.extractors.record.features["text_sim"]["asr"], "recogniser", "whisper")
    answers = [Heard("you", no_speech=True), Heard("the film")]
    monkeypatch.setattr(scorer.extractors, "_recognise", lambda _, waves: answers[: len(waves)])
    waves = [read_audio(clips[name]) for name in ("spk0-000", "spk0-002")]
    silent, spoken = scorer.extractors.simulated_text(waves)
    assert (silent.status, silent.text, len(silent.states)) == ("no-speech", "", 1)
    assert spoken.status != "no-speech" and spoken.text


def test_one_bad_file_does_not_stop_the_others(exp, clips, capsys, tmp_path):
    (tmp_path / "bad.mp4").write_text("no film")
    good = clips["spk0-000"]
    code, out, err = run(capsys, "--exp-dir", exp, tmp_path / "bad.mp4", good, tmp_path / "gone.wav")
    assert code == 1
    assert err.count("error: ") == 2 and "bad.mp4" in err and "gone.wav" in err and "Traceback" not in err
    assert str(good) in out and "all" in out and "bad.mp4" not in out
    code, out, _ = run(capsys, "--exp-dir", exp, tmp_path / "bad.mp4", good, "--json")
    document = json.loads(out)
    files = document["files"]
    assert document["scale"] == [-3.0, 3.0] and not any("scale" in f for f in files)
    assert (
        code == 1 and "error" in files[0] and files[1]["overall"] == pytest.approx(files[1]["utterances"][0]["score"])
    )


def test_folders_lists_and_a_table_of_words(exp, clips, capsys, tmp_path):
    folder = tmp_path / "films" / "more"
    folder.mkdir(parents=True)
    shutil.copy(clips["spk0-000"], folder / "two words.mp4")
    shutil.copy(clips["spk0-002"], folder.parent / "b.mp4")
    (folder / "notes.txt").write_text("no film")
    soundfile.write(tmp_path / "z.wav", read_audio(clips["spk0-002"]), 16000)
    (tmp_path / "list").write_text(f"{tmp_path}/z.wav\n\n{folder.parent}/b.mp4\n")
    code, out, err = run(capsys, "--exp-dir", exp, folder.parent, "--list", tmp_path / "list", "--json")
    names = [Path(f["file"]).name for f in json.loads(out)["files"]]
    assert code == 0 and err == "" and names == ["b.mp4", "two words.mp4", "z.wav"]
    # Lines in any order; a tab after a name with a space.
    (tmp_path / "words").write_text("z so bad\n\nb the film was good\ntwo words\tnot so good\n")
    command = ["--exp-dir", exp, folder.parent, tmp_path / "z.wav", "--text", tmp_path / "words", "--json"]
    code, out, _ = run(capsys, *command)
    said = {Path(f["file"]).stem: f["utterances"][0]["transcript"] for f in json.loads(out)["files"]}
    assert code == 0 and said == {"z": "so bad", "b": "the film was good", "two words": "not so good"}


def test_a_bar_is_drawn_on_a_terminal_only(exp, clips, tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    long = clip(tmp_path / "long.mp4", 4.0, 3)
    words = ["--exp-dir", str(exp), str(long), str(clips["spk0-000"])]
    words += ["--device", "cpu", "--max-seconds", "1", "--cut", "yes", "--batch-size", "2"]
    done = call_here("predict", *words)
    command = [sys.executable, "-m", "sdumc.bin.predict", *words]
    assert done.returncode == 0 and done.stderr == ""
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=terminal, text=True) as shown:
        os.close(terminal)
        drawn = b""
        while True:
            try:
                part = os.read(master, 4096)
            except OSError:  # Linux's way to say that the other end is closed
                break
            if not part:
                break
            drawn += part
        out = shown.stdout.read()
    os.close(master)
    assert shown.returncode == 0 and out == done.stdout
    text = drawn.decode()
    assert "long.mp4:   0%|" in text and "spk0-000.mp4: " in text and "utterance 2 of" in text
    # A long file moves the bar too.
    assert any(0 < int(p) < 50 for p in re.findall(r"long\.mp4: +(\d+)%", text))


def test_a_packed_archive_works_elsewhere(exp, packed, clips, tmp_path):
    decoded = predictions(exp, "missing")
    moved = exp.parents[1].with_name("away")
    media = tmp_path / "c.mp4"
    shutil.copy(clips["spk0-002"], media)
    exp.parents[1].rename(moved)  # another machine has none of this
    try:
        command = [sys.executable, "-m", "sdumc.bin.predict", "--exp-dir", packed.name, str(media), "--json"]
        done = subprocess.run(
            command, env={**ENV, "TMPDIR": str(tmp_path)}, cwd=packed.parent, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert json.loads(done.stdout)["files"][0]["overall"] == pytest.approx(decoded["spk0-002"], abs=1e-4)
    finally:
        moved.rename(exp.parents[1])
    assert not list(tmp_path.glob("sdumc-*"))  # nothing of the archive is left behind


@pytest.fixture(scope="module")
def asr_exp(exp):
    """A model of the same clips whose missing flow reads ASR text; there is no projector."""
    from sdumc.bin import decode, extract_audio, extract_text, finish_dump, recognize, score

    root = exp.parents[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        places = ["--data-dir", "data/all", "--dump-dir", "dump/asr"]
        common = [*places, "--device", "cpu", "--batch-size", "4"]
        recognize.main([*common, "--model", "models/ctc", "--speech-test", "level"])
        finish_dump.main([*places, "--name", "asr_hyp"])
        extract_audio.main([*common, "--model", "models/encoder", "--layer", "-2"])
        llm = ["--llm", "models/llm", "--layers", "-2", "--context", "prompt"]
        extract_text.main([*common, *llm])
        extract_text.main([*common, *llm, "--name", "text_asr", "--text", "data/all/text_asr"])
        for name in ("audio", "text", "text_asr"):
            finish_dump.main([*places, "--name", name])
        sets = ["--train-dir", "dump/asr", "--valid-dir", "dump/asr", "--exp-dir", "exp/asr"]
        train = [sys.executable, "-m", "sdumc.bin.train", *sets, *SMALL, "--missing-text", "asr", "--device", "cpu"]
        subprocess.run(train, env=ENV, check=True, capture_output=True)
        output = ["--exp-dir", "exp/asr", "--data-dir", "dump/asr", "--output-dir", "exp/asr/decode_all"]
        decode.main([*output, "--condition", "full", "missing", "--device", "cpu"])
        table = "exp/asr/decode_all/missing/predictions.tsv"
        score.main(["--predictions", table, "--output", table.replace("predictions.tsv", "score.json")])
    return root / "exp/asr"


def test_asr_text_in_the_missing_flow(asr_exp, clips, tmp_path):
    """predict and a packed model recognise the words with the recipe's recogniser."""
    pack.main(["--exp-dir", str(asr_exp), "--output", str(tmp_path / "asr")])
    decoded = predictions(asr_exp, "missing")
    words = read_table(asr_exp.parents[1] / "data/all/text_asr", allow_empty=True)
    assert len(set(words.values())) > 1  # or the comparison would say nothing
    for folder in (asr_exp, tmp_path / "asr"):
        scorer = Scorer.load(folder, device="cpu")
        assert not scorer.notes
        for utt in list(clips)[:3]:
            (only,) = scorer.score(clips[utt]).utterances
            assert (only.text, only.transcript, only.status) == ("asr", words[utt], "ok" if words[utt] else "empty")
            assert only.score == pytest.approx(decoded[utt], abs=1e-4)
    assert sorted(p.name for p in (tmp_path / "asr/models").iterdir()) == ["ctc", "encoder", "llm"]
    card = (tmp_path / "asr/README.md").read_text()
    assert "a speech recogniser writes one" in card and "| all | missing | audio, ASR text in the missing flow" in card
    assert "recognises speech" in card and "simulated from the sound" not in card
    silent = tmp_path / "quiet.wav"
    soundfile.write(silent, np.concatenate([np.zeros(16000), 0.01 * np.ones(600)]), 16000, subtype="FLOAT")
    (only,) = scorer.score(silent).utterances
    assert only.text == "asr"


def test_what_is_in_a_packed_folder(exp, packed, tmp_path):
    target = tmp_path / "tiny"
    pack.main(["--exp-dir", str(exp), "--output", str(target)])
    card = (target / "README.md").read_text()
    score = json.loads((exp / "decode_all/missing/score.json").read_text())
    assert f"| all | missing | audio, simulated text, video | 6 | {score['mae']:.3f} [" in card
    assert card.startswith("---\n") and "library_name: sdumc" in card
    said = (target / "config.yaml").read_text() + (target / "extractors.yaml").read_text() + card
    assert str(exp.parents[1]) not in said and "exp/projector" not in said and "dump/all" not in said
    assert sorted(p.name for p in (target / "models").iterdir()) == ["ctc", "encoder", "llm", "projector", "vision"]
    again = tmp_path / "tiny.tar"
    pack.main(["--exp-dir", str(exp), "--output", str(again)])
    assert again.read_bytes() == packed.read_bytes()
    with pytest.raises(UserError, match="there already"):
        pack.main(["--exp-dir", str(exp), "--output", str(target)])
    assert Scorer.load(target, device="cpu").features  # and packs can be packed again
    pack.main(["--exp-dir", str(target), "--output", str(tmp_path / "second")])
    assert (tmp_path / "second/extractors.yaml").read_bytes() == (target / "extractors.yaml").read_bytes()


def test_without_the_large_models(exp, clips, tmp_path, monkeypatch):
    names = ["encoder=someone/encoder", "llm=someone/llm", "vision=someone/vision", "ctc=someone/ctc"]
    with pytest.raises(UserError, match="--hub-names encoder=OWNER/NAME"):
        pack.main(["--exp-dir", str(exp), "--output", str(tmp_path / "light"), "--no-backbones"])
    pack.main(["--exp-dir", str(exp), "--output", str(tmp_path / "light"), "--no-backbones", "--hub-names", *names])
    assert [p.name for p in (tmp_path / "light/models").iterdir()] == ["projector"]
    assert "hf download someone/llm" in (tmp_path / "light/README.md").read_text()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="hf download someone/encoder"):
        Scorer.load(tmp_path / "light", device="cpu")
    here = Scorer.load(tmp_path / "light", device="cpu", model_dir=exp.parents[1] / "models")
    assert here.score(clips["spk0-002"]).overall == pytest.approx(predictions(exp, "missing")["spk0-002"], abs=1e-4)


def in_hub_cache(pack_path: Path, cache: Path, name: str) -> Path:
    """A pack as `hf download` leaves it: links in a snapshot, content elsewhere; gives the snapshot."""
    home = cache / f"models--{name.replace('/', '--')}"
    snapshot = home / "snapshots" / ("0" * 39 + "1")
    files = [pack_path] if pack_path.is_file() else sorted(p for p in pack_path.rglob("*") if p.is_file())
    for number, source in enumerate(files):
        link = snapshot / (source.name if source == pack_path else source.relative_to(pack_path))
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = home / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(source.read_bytes())
        link.symlink_to(blob)
    (home / "refs").mkdir()
    (home / "refs/main").write_text(snapshot.name)
    return snapshot


def test_a_model_of_the_hubs_cache(exp, packed, clips, tmp_path, monkeypatch):
    """By its name there, without a network; and a plain message where it is not there, or not whole."""
    from huggingface_hub import ModelCard, constants

    cache, media = tmp_path / "hub", clips["spk0-002"]
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    pack.main(["--exp-dir", str(exp), "--output", str(tmp_path / "tiny")])
    snapshot = in_hub_cache(tmp_path / "tiny", cache, "someone/tiny")
    in_hub_cache(packed, cache, "someone/archive")
    monkeypatch.chdir(tmp_path)  # where there is no folder someone/
    expected = pytest.approx(predictions(exp, "missing")["spk0-002"], abs=1e-4)
    for name in ("someone/tiny", "someone/archive"):
        assert Scorer.load(name, device="cpu").score(media).overall == expected
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "sdumc.bin.predict",
            "--exp-dir",
            "someone/tiny",
            "--json",
            "--device",
            "cpu",
            str(media),
        ],
        env={**ENV, "HF_HUB_CACHE": str(cache), "HTTPS_PROXY": "http://127.0.0.1:9"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"][0]["overall"] == pytest.approx(expected.expected, abs=1e-4)
    with pytest.raises(UserError, match=rf"is not in the cache {cache}; fetch it once.*hf download someone/else"):
        Scorer.load("someone/else", device="cpu")
    # The hub's own reader finds the scores in the card.
    found = ModelCard.load(snapshot / "README.md").data.eval_results
    score = json.loads((exp / "decode_all/missing/score.json").read_text())
    assert any(r.metric_name == "MAE, missing" and r.metric_value == round(score["mae"], 4) for r in found)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"is not whole, it has no model\.safetensors"):
        Scorer.load("someone/tiny", device="cpu")
    (snapshot / "extractors.yaml").unlink()
    with pytest.raises(UserError, match=r"has no extractors\.yaml"):
        Scorer.load("someone/tiny", device="cpu")


def test_packs_of_earlier_and_later_versions(exp, clips, tmp_path):
    """As the first version wrote them; checked once with a pack that it made, which scored as it did then."""
    from safetensors.torch import load_file, save_file

    pack.main(["--exp-dir", str(exp), "--output", str(tmp_path / "tiny")])
    old = tmp_path / "tiny"
    weights = load_file(old / "model.safetensors")
    for name in [n for n in weights if n.endswith(".inverse_deviation")]:
        base = name.removesuffix("inverse_deviation")
        weight = weights[f"{base}weight"] * weights.pop(name)  # features were not normalised
        weights[f"{base}bias"] -= weight @ weights.pop(f"{base}mean")
        weights[f"{base}weight"] = weight
    save_file(weights, old / "model.safetensors")
    (old / "scale.yaml").unlink()
    config = yaml.safe_load((old / "config.yaml").read_text())
    for key in ("pooling", "output-range", "missing-text", "min-epoch-steps", "init-lr-factor"):
        del config[key]
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    scores = json.loads((old / "scores.json").read_text())
    for values in scores["all"].values():
        for key in ("intervals", "interval_method", "ccc", "scale"):
            values.pop(key, None)
    (old / "scores.json").write_text(json.dumps(scores))
    expected = pytest.approx(predictions(exp, "missing")["spk0-002"], abs=1e-4)
    assert Scorer.load(old, device="cpu").score(clips["spk0-002"]).overall == expected
    pack.main(["--exp-dir", str(old), "--output", str(tmp_path / "again")])
    mae = scores["all"]["missing"]["mae"]
    assert (
        f"| all | missing | audio, simulated text, video | 6 | {mae:.3f} |"
        in (tmp_path / "again/README.md").read_text()
    )
    (old / "config.yaml").write_text(yaml.safe_dump({**config, "later": 1}))
    with pytest.raises(UserError, match="'later'; if a newer version of sdumc wrote the file, update this one"):
        Scorer.load(old, device="cpu")


def test_a_damaged_archive_is_refused(packed, tmp_path):
    short = tmp_path / "short.tar"
    short.write_bytes(packed.read_bytes()[:200_000])
    with pytest.raises(UserError, match=r"short\.tar"):
        Scorer.load(short)


def test_training_on_features_from_elsewhere_cannot_predict(exp, tmp_path):
    shutil.copytree(exp, tmp_path / "exp", ignore=shutil.ignore_patterns("epochs", "tensorboard", "decode_*"))
    (tmp_path / "exp/extractors.yaml").write_text("{}\n")
    with pytest.raises(UserError, match="came from elsewhere"):
        Scorer.load(tmp_path / "exp")
    os.remove(tmp_path / "exp/extractors.yaml")
    with pytest.raises(UserError, match=r"extractors\.yaml: no such file"):
        Scorer.load(tmp_path / "exp")


# ------------------------------------------------------------------------------------------------------ error streams

STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")


def run_commands(*commands: str, strict: bool = True) -> list[str]:
    """Run commands one after the other as recipes do; their error streams by lines, without time stamps.

    With ``strict``, all that Python and its packages warn of is shown, also what is not meant for users.
    """
    words = " --then ".join(f"sdumc.bin.{command}" for command in commands).split()
    python = [sys.executable, *(("-W", "default") if strict else ())]
    env = {k: v for k, v in ENV.items() if k not in ("PYTHONWARNINGS", "TRANSFORMERS_VERBOSITY")}
    done = subprocess.run([*python, str(ROOT / "utils/several.py"), *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [STAMP.sub("", line) for line in done.stderr.splitlines()]


@pytest.mark.parametrize("strict", [False, True], ids=["as users call it", "with all warnings"])
def test_predict_prints_nothing_to_the_error_stream(exp, clips, packed, monkeypatch, strict):
    monkeypatch.chdir(exp.parents[1])
    clip = clips["spk0-002"]
    both = [f"predict --exp-dir {path} --device cpu {clip}" for path in ("exp/tiny", packed)]
    assert run_commands(*both, strict=strict) == []


def test_error_streams_have_our_own_lines_only(exp, tmp_path, monkeypatch):
    monkeypatch.chdir(exp.parents[1])
    places = f"--data-dir data/all --dump-dir {tmp_path}"
    common = f"{places} --device cpu --batch-size 4"
    models = "--encoder models/encoder --llm models/llm"
    dumps = "--train-dir dump/all --valid-dir dump/all"
    lines = run_commands(
        f"recognize {common} --name hyp --model models/ctc",
        f"simulate_text {common} {models} --projector exp/projector --layers -2 --max-new-tokens 12",
        f"extract_audio {common} --model models/encoder --layer -2",
        f"extract_text {common} {models} --projector exp/projector --layers -2",
        f"extract_video {common} --model models/vision --fps 5",
        f"finish_dump {places} --name video",
        f"train_projector {models} --train-data-dir data/all --output {tmp_path}/projector --hidden 16 --steps 2 "
        "--device cpu",
        f"train {dumps} --exp-dir {tmp_path}/exp --dim 16 --content-dim 8 --epochs 1 --device cpu",
        f"decode --exp-dir {tmp_path}/exp --data-dir dump/all --output-dir {tmp_path}/out --device cpu "
        "--condition full",
        f"score --predictions {tmp_path}/out/predictions.tsv --output {tmp_path}/score.json",
        f"pack --exp-dir exp/tiny --output {tmp_path}/tiny.tar",
    )
    expected = [
        *["INFO 6 of 6 utterances, # a second"] * 5,
        f"INFO {tmp_path}/video.scp: 6 utterances, # frames, 24 dimensions, 0 absent",
        "INFO data/all: encoding 6 utterances before the first step",
        "INFO 6 of 6 utterances, # a second",
        "INFO 6 utterances, # parameters, 2 steps",
        "INFO step 2 of 2: train loss #, # steps a second",
        "INFO text of the missing flow: simulated text",
        "INFO # parameters; 6 train and 6 valid utterances",
        "INFO labels from -# (very negative) to # (very positive)",
        f"INFO complete and missing flows, of {', '.join(('audio', 'real text', 'simulated text', 'video'))}; "
        + "the epoch is chosen under full and missing",
        "INFO 1 steps an epoch on 1 x cpu",
        "INFO epoch   1/1  loss #  valid MAE: full #  missing #  best  (# s)",
        "INFO done: epoch 1 is taken, mean MAE on valid # (epoch 1 alone: #) -> "
        f"{tmp_path}/exp/model.valid-best.safetensors",
        "WARNING the best epoch is the last one (1): still improving; train longer",
        f"INFO full: 6 utterances (audio, real text, video) -> {tmp_path}/out",
        f"INFO {tmp_path}/tiny.tar: # MB; score with: sdumc predict --exp-dir {tmp_path}/tiny.tar CLIP",
    ]
    lines = [line for line in lines if "beat predicting the median" not in line]  # as the rounding of one epoch falls
    for line, form in zip(lines, expected, strict=True):
        assert re.fullmatch(re.escape(form).replace(r"\#", r"\d+(\.\d+)?"), line), (line, form)
