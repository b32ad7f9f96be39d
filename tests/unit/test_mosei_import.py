"""The three distributions of CMU-MOSEI, read from miniatures, and what is wrong with damaged ones."""

from __future__ import annotations

import csv
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import mosei_miniature as mini

from sdumc.bin import import_authors, import_toolkit, prepare_mosei
from sdumc.corpora import authors, raw, toolkit
from sdumc.corpora.annotations import Clip, find_labels, match_times, read_csd, read_labels, read_transcripts
from sdumc.corpora.importing import Corpus, Fold, check_disjoint, split_name, summary, utterance_id
from sdumc.corpora.raw import read_folds
from sdumc.data.dump import load_dump, load_matrix
from sdumc.data.kaldi_dir import load_kaldi_dir, validate_kaldi_dir
from sdumc.data.media import read_audio, read_frames
from sdumc.data.tables import read_dropped
from sdumc.errors import UserError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """The raw miniature with .csd labels; not to be changed."""
    return mini.make_raw(tmp_path_factory.mktemp("raw"), "csd")


@pytest.fixture
def own(corpus, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(corpus, tmp_path / "corpus"))


def prepare(corpus: Path, data: Path, *words: str, max_drop: float = 0.3) -> None:
    folds = str(corpus / "cmu_mosei_std_folds.py")
    options = ["--corpus-dir", str(corpus), "--folds", folds, "--data-dir", str(data), "--max-drop", str(max_drop)]
    prepare_mosei.main([*options, *words])


def dropped(folder: Path) -> dict[str, str]:
    return {utt: reason for utt, _, reason in read_dropped(folder / "dropped.tsv")}


# -------------------------------------------------------------------------------------------------------- ids, folds


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("-3g5yACwYnA$_$10", ("-3g5yACwYnA", "-3g5yACwYnA-10")),
        ("a_b__c_9xZ_$_$0", ("a_b__c_9xZ_", "a_b__c_9xZ_-0")),
        ("a_b__c_9xZ__0", ("a_b__c_9xZ_", "a_b__c_9xZ_-0")),
        ("100178_3", ("100178", "100178-3")),
        ("alone", ("alone", "alone")),
        ("not_a_number", ("not_a_number", "not_a_number")),
    ],
)
def test_one_id_whatever_the_source(name, expected):
    assert split_name(name) == expected


def test_utterances_sort_as_their_speakers():
    videos = ["100178", "10017", "1001", "-3g5yACwYnA", "a_b", "a"]
    by_id = sorted(utterance_id(v, c) for v in videos for c in ("0", "10", "9"))
    assert [u.rpartition("-")[0] for u in by_id] == [v for v in sorted(videos) for _ in range(3)]


def test_folds_from_lists_and_from_the_sdk_without_running_it(corpus, tmp_path):
    assert read_folds(corpus / "folds") == read_folds(corpus / "cmu_mosei_std_folds.py") == mini.FOLDS
    script = tmp_path / "std_folds.py"
    script.write_text("standard_train_fold=['a']\nstandard_valid_fold=['b']\nstandard_test_fold=open('x','w')\n")
    with pytest.raises(UserError, match=r"std_folds.py:3: standard_test_fold is not a plain list"):
        read_folds(script)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("train", "message"),
    [("a\nb\nv\n", "in train and in valid"), ("a\na\n", "twice"), ("a b\n", "train.txt:1"), ("", "empty")],
)
def test_bad_folds(tmp_path, train, message):
    for name, text in (("train", train), ("valid", "v\n"), ("test", "t\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_folds(tmp_path)
    (tmp_path / "test.txt").unlink()
    with pytest.raises(UserError):
        read_folds(tmp_path)


def test_a_video_in_two_folds_is_refused():
    with pytest.raises(UserError, match="disjoint"):
        check_disjoint([Fold("train", speakers={"a"}), Fold("test", speakers={"a", "b"})])


# --------------------------------------------------------------------------------------------------------------- raw


@pytest.mark.parametrize("form", ["csv", "csd"])
def test_raw_directories(tmp_path, form, capsys):
    corpus = mini.make_raw(tmp_path, form)
    prepare(corpus, tmp_path / "data")
    output = capsys.readouterr().out
    assert "train  2 (2249)  7 (16326)   1         0" in output and "gone1234567-0" in output
    expected = {utterance_id(v, c): y for (v, c), y in mini.labels().items() if v not in (mini.LOST, mini.STRAY)}
    found = {}
    for name in mini.FOLDS:
        assert validate_kaldi_dir(tmp_path / "data" / name, check_media=True) == []
        found.update(load_kaldi_dir(tmp_path / "data" / name).utt2label)
    assert found == pytest.approx(expected)
    train = load_kaldi_dir(tmp_path / "data/train")
    first = f"{mini.HYPHEN}-0"
    assert train.segments[first].start == 0 and train.segments[first].end == 1.1  # it starts at -0.2
    assert train.text[f"{mini.HYPHEN}-10"] == "it was good ___ very good"
    assert train.wav[mini.HYPHEN].endswith(".wav") and train.video[mini.HYPHEN].endswith(".mp4")
    assert load_kaldi_dir(tmp_path / "data/valid").wav[mini.NUMBER].endswith(".mp4")
    assert dropped(tmp_path / "data/train") == {f"{mini.LOST}-0": f"no media file ({mini.LOST})"}
    assert dropped(tmp_path / "data/valid") == {f"{mini.NUMBER}-7": "transcript without a label"}
    assert set(dropped(tmp_path / "data")) == {mini.STRAY}


def test_the_cut_is_exact(corpus, tmp_path):
    prepare(corpus, tmp_path / "data")
    data = load_kaldi_dir(tmp_path / "data/train")
    utt = f"{mini.UNDERSCORE}-2"
    assert len(read_audio(data.audio_source(utt))) == round(1.1 * 16000)
    assert np.abs(read_audio(data.audio_source(utt))[160:-160]).max() < 1e-4  # the silent one
    whole = read_audio(data.wav[mini.HYPHEN])
    assert np.array_equal(read_audio(data.audio_source(f"{mini.HYPHEN}-10")), whole[17600:36800])
    times = [t for t, _ in read_frames(data.video_source(utt), 4)]
    assert len(times) in (4, 5) and 0 <= times[0] < 0.3


def test_a_file_a_clip(tmp_path):
    corpus = mini.make_raw(tmp_path, segmented=True)
    prepare(corpus, tmp_path / "data")
    data = load_kaldi_dir(tmp_path / "data/train")
    assert not data.segments and len(data.utterances) == 7
    assert data.video[f"{mini.HYPHEN}-10"].endswith(f"/{mini.HYPHEN}_10.mp4")
    assert dropped(tmp_path / "data")[f"{mini.NUMBER}_7"] == "a media file not used"


def test_more_than_allowed_fails_and_leaves_no_directory(corpus, tmp_path, capsys):
    with pytest.raises(UserError, match=r"1 of 8 labelled utterances \(12.5%\)"):
        prepare(corpus, tmp_path / "data", max_drop=0.01)
    assert not (tmp_path / "data/train/wav.scp").exists()
    assert f"{mini.LOST}-0" in dropped(tmp_path / "data/train") and (tmp_path / "data/folds.txt").exists()


def test_broken_media_are_listed(own, tmp_path):
    videos = own / "Raw/Videos/Full/Combined"
    film = (videos / f"{mini.HYPHEN}.mp4").read_bytes()
    (videos / f"{mini.HYPHEN}.mp4").write_bytes(film[: len(film) // 2])  # does not decode to its end
    silent = videos / f"{mini.NUMBER}.mp4"
    without_sound(silent)
    with pytest.raises(UserError, match="valid: 3 of 3 labelled utterances"):
        prepare(own, tmp_path / "data", max_drop=0.9)
    train, valid = dropped(tmp_path / "data/train"), dropped(tmp_path / "data/valid")
    assert len([u for u in train if u.startswith(mini.HYPHEN)]) == 4
    assert "no audio track" in valid[f"{mini.NUMBER}-0"]


def without_sound(path: Path) -> None:
    import av

    with av.open(str(path)) as source:
        frames = [f.to_ndarray(format="rgb24") for f in source.decode(video=0)]
    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=mini.FPS)
        stream.width, stream.height, stream.pix_fmt = mini.SIZE, mini.SIZE, "yuv420p"
        for frame in frames:
            target.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        target.mux(stream.encode())


def test_a_clip_beyond_the_end_of_its_video(own, tmp_path):
    file = own / f"Raw/Transcript/Segmented/Combined/{mini.OTHER}.txt"
    file.write_text(file.read_text().replace("___1.2___2.4___", "___1.2___9.4___"))
    import h5py

    with h5py.File(own / "Raw/Labels/CMU_MOSEI_Labels.csd", "r+") as f:
        intervals = f[f"All Labels/data/{mini.OTHER}/intervals"]
        intervals[0] = [1.2, 9.4]
    prepare(own, tmp_path / "data")
    assert "ends at 9.4 s" in dropped(tmp_path / "data/test")[f"{mini.OTHER}-4"]


def test_transcript_lines(tmp_path):
    folder = tmp_path / "Transcript/Segmented/Combined"
    folder.mkdir(parents=True)
    lines = [
        b"v____0___0.5___1.5___underscore at the end of the id",
        b"v____1___1.5___2.5___a___b___c",
        b"v____2___2___3___\x93typed on windows\x94",
        b"",
        b"v____3___x___4___no number",
        b"v____4___3___4",
        b"v____5___5___6___twice",
        b"v____5___5___6___twice",
        b"v____6___6___7___one",
        b"v____6___6___7___two",
    ]
    (folder / "v_.txt").write_bytes(b"\n".join(lines))
    found = read_transcripts(tmp_path)
    clips = found.clips["v_"]
    assert set(clips) == {"0", "1", "2", "5"}
    assert clips["1"].text == "a___b___c" and clips["0"].end == 1.5 and "typed on windows" in clips["2"].text
    assert set(found.refused["v_"]) == {"line5", "line6", "6"}
    assert "twice in the transcript" in found.refused["v_"]["6"] and "v_.txt:10" in found.refused["v_"]["6"]


def annotations(
    path: Path, rows: list[tuple], columns=("WorkerId", "Input.VIDEO_ID", "Input.CLIP", "Answer.sentiment")
):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([columns, *rows])
    return path


def test_annotators_are_averaged_and_count_once(tmp_path):
    rows = [("A", "-v", "0", "1"), ("B", "-v", "0", "2"), ("A", "-v", "0", "1"), ("C", "-v", "0", "")]
    rows += [("A", "-v", "1", "3"), ("A", "-v", "1", "-3")]
    found = read_labels(annotations(tmp_path / "l.csv", rows))
    assert found.by_clip == {"-v": {"0": 1.5}}
    assert "two answers" in found.refused["-v"]["1"]
    assert "1 empty answers ignored" in found.note


@pytest.mark.parametrize("answer", ["4", "nan", "good", "1_0"])
def test_answers_that_are_none(tmp_path, answer):
    with pytest.raises(UserError, match=r"l.csv:2: video 'v', clip '0'"):
        read_labels(annotations(tmp_path / "l.csv", [("A", "v", "0", answer)]))


def test_missing_column_and_missing_file(tmp_path):
    with pytest.raises(UserError, match="has no column"):
        read_labels(annotations(tmp_path / "l.csv", [], ("Input.VIDEO_ID", "Answer.sentiment")))
    for path in (tmp_path / "none.csv", tmp_path):
        if path == tmp_path:
            (tmp_path / "l.csv").unlink()
        with pytest.raises(UserError):
            read_labels(path)


def clip(name: str, start: float, end: float) -> Clip:
    return Clip("v", name, start, end, "words", "v.txt:1")


def test_rows_are_matched_by_their_times_only():
    clips = {c.clip: c for c in (clip("0", -0.5, 1.0), clip("10", 1.0, 2.0), clip("2", 2.0, 3.0), clip("3", 3.0, 4.0))}
    rows = [(2.0004, 3.0, 2.0), (0.0, 1.0, 1.0), (3.0, 4.0, -1.0), (3.0, 4.0, -1.0), (8.0, 9.0, 0.0)]
    matched, refused = match_times(clips, rows)
    assert matched == {"0": 1.0, "2": 2.0, "3": -1.0}
    assert refused == {"8-9": "label without a transcript clip of its times"}


def test_doubtful_times_are_refused():
    same = {c.clip: c for c in (clip("0", 0.0, 1.0), clip("1", 0.0, 1.0), clip("2", 2.0, 3.0))}
    matched, refused = match_times(same, [(0.0, 1.0, 1.0), (2.0, 3.0, 1.0), (2.0, 3.0, 2.0)])
    assert matched == {} and set(refused) == {"0", "1", "2"}


def test_csd_structure(corpus, tmp_path):
    sequence = read_csd(corpus / "Raw/Labels/CMU_MOSEI_Labels.csd")
    assert sequence.column("sad", 9) == 2 and sequence.column("sentiment", 0) == 0
    assert sequence.intervals[mini.HYPHEN].shape == (4, 2) and sequence.features[mini.HYPHEN].shape == (4, 7)
    cut = tmp_path / "cut.csd"
    cut.write_bytes((corpus / "Raw/Labels/CMU_MOSEI_Labels.csd").read_bytes()[:500])
    with pytest.raises(UserError, match=r"cut.csd: not an HDF5 file"):
        read_csd(cut)


def test_csd_in_parts_and_other_files(tmp_path):
    import h5py

    with h5py.File(tmp_path / "a.csd", "w") as f:
        for i in (10, 2):
            f[f"x/data/v_1[{i}]/intervals"] = np.array([[i, i + 1.0]])
            f[f"x/data/v_1[{i}]/features"] = np.array([[float(i)]])
    sequence = read_csd(tmp_path / "a.csd")
    assert sequence.features["v_1"].tolist() == [[2.0], [10.0]]
    with h5py.File(tmp_path / "b.csd", "w") as f:
        f["x/data/v/intervals"] = np.zeros((2, 2))
        f["x/data/v/features"] = np.zeros((3, 1))
    with pytest.raises(UserError, match="do not fit together"):
        read_csd(tmp_path / "b.csd")
    with h5py.File(tmp_path / "c.csd", "w") as f:
        f["other"] = np.zeros(3)
    with pytest.raises(UserError, match="expected one sequence"):
        read_csd(tmp_path / "c.csd")


def test_labels_without_media_and_the_reverse(own, tmp_path):
    (own / f"Raw/Videos/Full/Combined/{mini.UNDERSCORE}.mp4").rename(own / "Raw/Videos/Full/Combined/new_video_0.mp4")
    (own / f"Raw/Transcript/Segmented/Combined/{mini.NUMBER}.txt").write_text(f"{mini.NUMBER}___0___0___1.2___x\n")
    prepare(own, tmp_path / "data", max_drop=0.7)
    train, valid = dropped(tmp_path / "data/train"), dropped(tmp_path / "data/valid")
    assert train[f"{mini.UNDERSCORE}-0"] == f"sound, but no video file ({mini.UNDERSCORE})"
    assert valid[f"{mini.NUMBER}-1.2-2.4"] == "label without a transcript clip of its times"
    assert dropped(tmp_path / "data")["new_video_0"] == "a media file not used"


def test_not_a_raw_distribution(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        raw.raw_root(tmp_path / "none")
    for call in (read_transcripts, find_labels, raw.find_media):
        with pytest.raises(UserError):
            call(tmp_path)


def test_reasons_are_counted_by_kind():
    fold = Fold("train", left_out={f"v{i}-0": f"no media file (v{i})" for i in range(3)})
    table = summary(Corpus([fold]), "none", Path("data"))
    assert "train: 3 left out: no media file (such as v0-0; data/train/dropped.tsv)" in table
    table = summary(Corpus([fold]), "mosei", Path("data"))
    assert "train: 16323 utterances fewer than published: they are in no table of this copy" in table


# ----------------------------------------------------------------------------------------------------------- toolkit


@pytest.mark.parametrize("aligned", [False, True])
def test_toolkit_pickle(tmp_path, aligned, capsys):
    path = mini.make_pickle(tmp_path / ("aligned_50.pkl" if aligned else "unaligned_50.pkl"), aligned)
    import_toolkit.main(
        ["--pickle", str(path), "--data-dir", str(tmp_path / "data"), "--dump-dir", str(tmp_path / "dump")]
    )
    output = capsys.readouterr().out
    assert toolkit.file_sha256(path) in output and "not finite, set to 0" in output
    content = pickle.loads(path.read_bytes())
    for name in mini.FOLDS:
        dump = load_dump(tmp_path / "dump" / name)
        part = content[name]
        ids = [split_name(str(i))[1] for i in part["id"]]
        assert dump.utterances == sorted(ids)
        for i, utt in enumerate(ids):
            assert dump.labels[utt] == pytest.approx(float(part["regression_labels"][i]))
            tokens = int(part["text_bert"][i, 1].sum())
            assert np.array_equal(load_matrix(dump.features["text"].entries[utt]), part["text"][i, :tokens])
            frames = tokens if aligned else part["audio_lengths"][i]
            expected = np.where(np.isfinite(part["audio"][i, :frames]), part["audio"][i, :frames], 0)
            assert np.allclose(load_matrix(dump.features["audio"].entries[utt]), expected)
    test = load_dump(tmp_path / "dump/test")
    assert list(test.features["video"].absent) == [f"{mini.FACELESS}-0"]
    assert test.features["video"].meta["imported"] is True
    assert "text_sim" not in test.features


def test_toolkit_checksum(tmp_path):
    path = mini.make_pickle(tmp_path / "unaligned_50.pkl")
    digest = toolkit.file_sha256(path)
    known = next(iter(toolkit.PUBLISHED_SHA256))
    assert "as published" in toolkit.describe_sha256(path, known, None)
    assert "as asked for" in toolkit.describe_sha256(path, digest, digest.upper())
    assert "another release, or a damaged copy" in toolkit.describe_sha256(path, digest, None)
    for name, corpus in (("unaligned_50.pkl", "mosi"), ("aligned_50.pkl", "mosei")):
        said = toolkit.describe_sha256(tmp_path / name, digest, None, corpus)
        assert digest in said and "damaged" in said
    with pytest.raises(UserError, match="fetch the file again"):
        import_toolkit.main(["--pickle", str(path), "--sha256", known, "--data-dir", str(tmp_path / "data")])
    assert not (tmp_path / "data").exists()


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "unaligned_50.pkl"
    path.write_bytes(pickle.dumps({"train": Evil()}))
    with pytest.raises(UserError, match="refused"):
        toolkit.read_pickle(path)
    assert not (tmp_path / "ran").exists()
    path.write_bytes(pickle.dumps({"train": {}, "valid": {}}))
    with pytest.raises(UserError, match="has no folds"):
        toolkit.read_pickle(path)
    path.write_bytes(mini.make_pickle(tmp_path / "whole.pkl").read_bytes()[:100000])
    with pytest.raises(UserError):
        toolkit.read_pickle(path)


def import_pickle(path: Path, folder: Path, *words: str) -> None:
    places = ["--data-dir", str(folder / "data"), "--dump-dir", str(folder / "dump"), "--max-drop", "0.5"]
    import_toolkit.main(["--pickle", str(path), *places, *words])


@pytest.mark.parametrize("segmented", [False, True])
def test_toolkit_with_media(tmp_path, segmented, capsys):
    corpus = mini.make_raw(tmp_path / "corpus", segmented=segmented)
    path = mini.make_pickle(tmp_path / "unaligned_50.pkl")
    content = pickle.loads(path.read_bytes())
    for key, value in content["valid"].items():  # the first clip of valid is not in the pickle, but has a film
        content["valid"][key] = value[1:]
    path.write_bytes(pickle.dumps(content))
    import_pickle(path, tmp_path, "--corpus-dir", str(corpus), "--features", "audio", "video")
    output = capsys.readouterr().out
    assert "train  2 (2249)  7 (16326)   1" in output and f"such as {mini.LOST}-0" in output
    lost = f"{mini.LOST}_0" if segmented else mini.LOST
    assert dropped(tmp_path / "data/train") == {f"{mini.LOST}-0": f"no media file ({lost})"}
    spare = {f"{mini.NUMBER}_0", f"{mini.NUMBER}_7", f"{mini.STRAY}_0"} if segmented else {mini.STRAY}
    assert dropped(tmp_path / "data") == dict.fromkeys(spare, "media without a label in the pickle")
    assert f"{len(spare)} outside of the folds: media without a label in the pickle (such as {min(spare)};" in output
    for name in mini.FOLDS:
        assert validate_kaldi_dir(tmp_path / "data" / name, check_media=True) == []
        data, dump = load_kaldi_dir(tmp_path / "data" / name), load_dump(tmp_path / "dump" / name)
        assert dump.utterances == data.utterances and set(dump.features) == {"audio", "video"}
        assert bool(data.segments) != segmented


def test_an_import_leaves_no_features_of_another(tmp_path, released):
    """Text of the pickle (BERT) beside text simulated by an LLM would stop the training: other dimensions."""
    path = mini.make_pickle(tmp_path / "unaligned_50.pkl")
    import_pickle(path, tmp_path)
    assert set(load_dump(tmp_path / "dump/train").features) == {"audio", "text", "video"}
    import_pickle(path, tmp_path, "--features", "audio", "video")
    assert set(load_dump(tmp_path / "dump/train").features) == {"audio", "video"}
    dump = import_released(released)
    shutil.rmtree(released / "features" / authors.FOLDERS["text_sim"])
    import_released(released)
    assert set(load_dump(dump / "train").features) == {"audio", "text", "video"}
    assert not (dump / "train/text_sim.yaml").exists()


def test_a_fold_without_a_face(tmp_path):
    path = mini.make_pickle(tmp_path / "unaligned_50.pkl")
    content = pickle.loads(path.read_bytes())
    content["valid"]["vision"][:] = 0
    path.write_bytes(pickle.dumps(content))
    import_pickle(path, tmp_path)
    video = load_dump(tmp_path / "dump/valid").features["video"]
    assert len(video.absent) == 3 and not video.entries and video.dim == 35


def test_trimming():
    counts = toolkit.Trimmed()
    x = np.zeros((6, 2))
    x[:3] = 1
    assert len(toolkit.trim(x, 3, counts)) == 3 and len(toolkit.trim(x, 5, counts)) == 5  # zero frames can be true
    assert len(toolkit.trim(x, None, counts)) == 3
    assert len(toolkit.trim(x, 9, counts)) == 6 and counts.longer == 1
    assert toolkit.trim(x[::-1], 3, counts).all() and counts.front == 1
    assert len(toolkit.trim(x, 2, counts)) == 2 and counts.beyond == 1
    assert len(toolkit.trim(x, 0, counts)) == 0 and len(toolkit.trim(0 * x, 3, counts)) == 0 and counts.absent == 2
    x[0] = [np.nan, -np.inf]
    assert toolkit.trim(x, 3, counts)[0].tolist() == [0, 0] and (counts.values, counts.utterances) == (2, 1)


def test_toolkit_ids_twice(tmp_path):
    path = mini.make_pickle(tmp_path / "unaligned_50.pkl")
    content = pickle.loads(path.read_bytes())
    content["train"]["id"][1] = content["train"]["id"][0]
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="is there twice"):
        toolkit.read_pickle(path)


# ----------------------------------------------------------------------------------------------------------- authors


@pytest.fixture
def released(tmp_path) -> Path:
    return mini.make_authors(tmp_path / "authors")


def import_released(folder: Path, jobs: int = 1, max_drop: float = 0.01, transcripts: bool = True) -> Path:
    options = ["--features-dir", str(folder / "features"), "--labels", str(folder / "label_official.npz")]
    options += ["--transcripts", str(folder / "transcription.csv")] if transcripts else []
    options += ["--data-dir", str(folder / "data"), "--dump-dir", str(folder / "dump"), "--max-drop", str(max_drop)]
    import_authors.main([*options, "--num-jobs", str(jobs)])
    return folder / "dump"


def test_authors_features(released):
    dump = import_released(released, jobs=2)
    train = load_dump(dump / "train")
    assert {n: f.dim for n, f in train.features.items()} == {"audio": 12, "text": 20, "video": 9, "text_sim": 20}
    for feature, folder in authors.FOLDERS.items():
        for utt, place in train.features[feature].entries.items():
            video, _, number = utt.rpartition("-")
            expected = np.atleast_2d(np.load(released / "features" / folder / f"{video}_{number}.npy"))
            assert np.array_equal(load_matrix(place), expected.astype(np.float32))
    expected = mini.labels()
    assert train.labels == pytest.approx({u: expected[tuple(u.rsplit("-", 1))] for u in train.utterances})
    assert "it was good ___ very good" in (released / "data/train/text").read_text()


def test_authors_number_of_jobs_does_not_matter(released, tmp_path):
    first = load_dump(import_released(released, jobs=1) / "train")
    a = {u: load_matrix(p) for u, p in first.features["text_sim"].entries.items()}
    second = load_dump(import_released(released, jobs=5, transcripts=False) / "train")
    assert all(np.array_equal(a[u], load_matrix(p)) for u, p in second.features["text_sim"].entries.items())
    assert not (released / "data/train/text").exists()


def test_authors_missing_and_surplus_files(released):
    target = released / "features" / authors.FOLDERS["video"]
    (target / f"{mini.HYPHEN}_3.npy").rename(target / "unknown_1.npy")
    with pytest.raises(UserError, match=r"1 of 7 utterances of train have no .npy file"):
        import_released(released)
    dump = import_released(released, max_drop=0.2)
    assert list(load_dump(dump / "train").features["video"].absent) == [f"{mini.HYPHEN}-3"]
    assert dropped(released / "data") == {"unknown_1": "feature file without a label (video)"}
    for folder in authors.FOLDERS.values():
        (released / "features" / folder / f"{mini.NUMBER}_0.npy").unlink()
    import_released(released, max_drop=0.4)
    assert dropped(released / "data/valid") == {f"{mini.NUMBER}-0": "label without a single feature file"}


def test_authors_bad_files(released):
    file = released / "features" / authors.FOLDERS["audio"] / f"{mini.HYPHEN}_0.npy"
    whole = file.read_bytes()
    for bad, message in ((whole[:-9], "cut short"), (b"text", "not an array")):
        file.write_bytes(bad)
        with pytest.raises(UserError, match=message):
            import_released(released)
    np.save(file, np.full((3, 12), np.nan, np.float32))
    with pytest.raises(UserError, match="NaN"):
        import_released(released)
    np.save(file, np.ones((3, 13), np.float32))
    with pytest.raises(UserError, match="dimension"):
        import_released(released)
    file.write_bytes(whole)
    import_released(released)


def test_authors_without_simulated_text(released):
    shutil.rmtree(released / "features" / authors.FOLDERS["text_sim"])
    dump = import_released(released)
    assert set(load_dump(dump / "train").features) == {"audio", "text", "video"}
    assert "text_sim: left out, there is no" in (released / "data/folds.txt").read_text()


def test_authors_label_file(tmp_path, released):
    np.savez(tmp_path / "l.npz", train_corpus=np.array({"a_0": {"val": 1.0}}, dtype=object))
    with pytest.raises(UserError, match="val_corpus"):
        authors.read_labels(tmp_path / "l.npz", None)
    corpora = {key: np.array({"a_0": {"emo": "x"}}, dtype=object) for key in authors.CORPORA.values()}
    np.savez(tmp_path / "l.npz", **corpora)
    with pytest.raises(UserError, match="'a_0': has no number 'val'"):
        authors.read_labels(tmp_path / "l.npz", None)
    (tmp_path / "t.csv").write_text("name,chinese\na_0,x\n")
    with pytest.raises(UserError, match="english"):
        authors.read_transcripts(tmp_path / "t.csv")


# -------------------------------------------------------------------------------------------------------- the recipe


@pytest.mark.parametrize("config", ["train", "train_released"])
def test_training_settings(config, capsys):
    from sdumc.bin import train

    recipe = Path(__file__).resolve().parents[2] / "egs/mosei"
    assert train.main(["--dry-run", "--config", str(recipe / "conf" / f"{config}.yaml")]) == 0
    assert "settings are sound" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["simulation", "simulation_released", "text", "text_released"])
def test_text_settings(name):
    from sdumc.bin import extract_text, simulate_text

    recipe = Path(__file__).resolve().parents[2] / "egs/mosei"
    words = ["--config", str(recipe / "conf" / f"{name}.yaml"), "--data-dir", "d", "--dump-dir", "u", "--llm", "l"]
    if name.startswith("simulation"):
        simulate_text.get_parser().parse_args([*words, "--encoder", "e", "--projector", "p"])
    else:
        extract_text.get_parser().parse_args([*words, "--text", "t"])


def test_released_settings_are_those_of_the_public_code():
    from sdumc.training.settings import get_parser, learning_rate

    recipe = Path(__file__).resolve().parents[2] / "egs/mosei"
    args = get_parser().parse_args(["--config", str(recipe / "conf/train_released.yaml")])
    expected = {"dim": 256, "content_dim": 128, "dropout": 0.3, "attention_dropout": 0.5, "scale": 0.3}
    expected |= {"mask_padding": False, "imagination": "none", "fusion": "umca", "flows": "both"}
    expected |= {"mse_complete": 0.5, "mse_missing": 0.5, "distil_query": 0.1, "distil_content": 0.7}
    expected |= {"similarity": 0.13, "contrast": 0.5, "temperature": 2.0}
    expected |= {"batch_size": 96, "batch_frames": 0, "epochs": 25, "lr": 1e-4, "weight_decay": 1e-5, "clip_grad": 0}
    expected |= {"modality_dropout": 0, "normalise_features": False, "average_best": 1, "missing_text": "simulated"}
    assert {name: getattr(args, name) for name in expected} == expected
    rates = [learning_rate(args, epoch) for epoch in (1, 5, 6, 15, 16, 25)]
    assert rates == pytest.approx([2e-5, 1e-4, 1e-4, 1e-4, 9e-5, 9e-5])


def test_plan_by_hand():
    """One line of each table of the plan page, worked out by hand."""
    plan = Path(__file__).resolve().parents[2] / "egs/mosei/local/plan.py"
    words = ["--clips", "1000", "--hours", "2", "--tokens", "25", "--simulation", "4", "--audio", "200"]
    words += ["--train-step", "0.5", "--train-share", "0.7"]
    done = subprocess.run([sys.executable, plan, *words], capture_output=True, text=True, check=True)
    lines = {" ".join(line.split()[:-1]): line.split()[-1] for line in done.stdout.splitlines() if line.strip()}
    assert lines["audio H 3600 50 D"] == "1.5"  # 2 h x 3600 s x 50 frames x 1024 numbers x 4 bytes = 1.47 GB
    assert lines["text_sim N L D"] == "0.4"  # 1000 x 25 x 4096 x 4 bytes = 0.41 GB
    assert lines["video H 3600 fps D"] == "0.1"  # 7200 s x 5 x 1024 x 4 bytes = 0.147 GB
    assert lines["2 text_sim N / s"] == "0.1"  # 250 s
    assert lines["4 train, each seed epochs (N_train / 96) b"] == "0.0"  # 25 x 8 batches x 0.5 s = 100 s
    assert lines["2 text_asr H / a"] == "?"
    for folds, hours in ((5, "6.0"), (0, "1.0"), (1, "1.0")):
        words = [sys.executable, plan, "--projector-step", "1", "--projector-steps", "3600", "--projector-folds", folds]
        done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=True)
        assert f"2 projector x (1 + F), if none is given           {hours}" in done.stdout
    words = [sys.executable, plan, "--models", "small", "--clips", "1000", "--hours", "2", "--tokens", "250"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    lines = {" ".join(line.split()[:-1]): line.split()[-1] for line in done.stdout.splitlines() if line.strip()}
    assert lines["audio H 3600 50 D"] == "1.1" and lines["text N L D"] == "0.6"  # 768 and 576 numbers
    # A link in another recipe: that corpus, and that recipe's models (Whisper and Qwen2.5).
    plan = Path(__file__).resolve().parents[2] / "egs/sims/local/plan.py"
    for models, dims in (("large", (1280, 3584)), ("small", (512, 896))):
        words = [sys.executable, plan, "--models", models, "--hours", "20", "--tokens", "1000"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        lines = {" ".join(line.split()[:-1]): line.split()[-1] for line in done.stdout.splitlines() if line.strip()}
        assert done.stdout.startswith("2281 clips, 20.0 hours")
        sizes = 20 * 3600 * 50 * dims[0] * 4e-9, 2281 * 1000 * dims[1] * 4e-9
        assert lines["audio H 3600 50 D"] == f"{sizes[0]:.1f}" and lines["text N L D"] == f"{sizes[1]:.1f}"
