"""The driver of the importers, with a source of its own: what is written, left out, listed and refused."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sdumc.corpora.importing import ClipMedia, Corpus, Fold, import_corpus
from sdumc.data.kaldi_dir import load_kaldi_dir, validate_kaldi_dir
from sdumc.data.tables import read_dropped, read_table
from sdumc.errors import UserError
from sdumc.scale import LabelScale, scale_of

SCALE = LabelScale(1.0, 5.0, "none")


def read_stars(folder: Path, rows: list[tuple[str, str, float]]) -> Corpus:
    """A source in a few lines: sounds of half a second with one to five stars, (set, name, stars)."""
    folds = {name: Fold(name, scale=SCALE) for name in ("train", "valid", "test")}
    for number, (name, clip, stars) in enumerate(rows):
        file = folder / f"{clip}.wav"
        if not file.exists():
            soundfile.write(file, np.full(8000, 0.1, np.float32), 16000)
        folds[name].add(f"{clip}-{number}", clip, stars, "some  words", ClipMedia(clip, file))
    return Corpus(list(folds.values()), ["five stars"], {"x.wav": "a file without stars"})


def options(folder: Path, max_drop: float = 0.4) -> Namespace:
    return Namespace(data_dir=str(folder / "data"), max_drop=max_drop, counts="none", shared_speakers="refuse")


ROWS = [("train", "a", 1), ("train", "b", 5), ("train", "c", 6), ("valid", "d", 2.5), ("test", "e", 4)]


def test_a_source_on_another_scale(tmp_path, capsys):
    import_corpus(lambda: read_stars(tmp_path, ROWS), options(tmp_path))
    train = load_kaldi_dir(tmp_path / "data/train")
    assert train.utt2label == {"a-0": 1.0, "b-1": 5.0} and train.text["a-0"] == "some words"
    assert validate_kaldi_dir(tmp_path / "data/train", check_media=True) == []
    assert scale_of(tmp_path / "data/train") == SCALE
    reason = "label 6.0 is outside [1, 5]; correct it or leave the utterance out"
    assert read_dropped(tmp_path / "data/train/dropped.tsv") == [("c-2", "data", reason)]
    assert read_dropped(tmp_path / "data/dropped.tsv") == [("x.wav", "data", "a file without stars")]
    output = capsys.readouterr().out
    assert output == (tmp_path / "data/folds.txt").read_text() and "five stars" in output
    assert "1 outside of the folds: a file without stars (such as x.wav;" in output


def test_broken_media_are_left_out_with_their_reason(tmp_path):
    (tmp_path / "b.wav").write_bytes(b"")
    rows = [*ROWS[:2], ("train", "f", 3), *ROWS[3:]]
    import_corpus(lambda: read_stars(tmp_path, rows), options(tmp_path))
    (utt, stage, reason), *others = read_dropped(tmp_path / "data/train/dropped.tsv")
    assert (utt, stage, others) == ("b-1", "data", []) and reason.startswith(
        f"{tmp_path}/b.wav: the media file is empty"
    )
    assert set(read_table(tmp_path / "data/train/wav.scp")) == {"a-0", "f-2"}


def test_too_many_left_out_or_a_video_in_two_folds(tmp_path):
    with pytest.raises(UserError, match=r"train: 1 of 3 labelled utterances \(33.3%\) cannot be used"):
        import_corpus(lambda: read_stars(tmp_path, ROWS), options(tmp_path, 0.1))
    assert not (tmp_path / "data/valid/wav.scp").exists() and (tmp_path / "data/train/dropped.tsv").exists()
    with pytest.raises(UserError, match="video 'a' is in train and in valid"):
        import_corpus(lambda: read_stars(tmp_path, [*ROWS, ("valid", "a", 1)]), options(tmp_path))
    assert not (tmp_path / "data/folds.txt").exists()
    with pytest.raises(UserError, match="valid: no labelled utterance found"):
        import_corpus(lambda: read_stars(tmp_path, [*ROWS[:2], ROWS[4]]), options(tmp_path))


def test_ids_that_no_table_can_hold(tmp_path):
    with pytest.raises(UserError, match="train: utterance 'a b-0': an id must have"):
        Fold("train").add("a b-0", "a b", 1.0)


def test_an_older_import_leaves_nothing_behind(tmp_path):
    import_corpus(lambda: read_stars(tmp_path, ROWS), options(tmp_path))
    import_corpus(lambda: read_stars(tmp_path, [*ROWS[:2], *ROWS[3:]]), options(tmp_path))
    assert not (tmp_path / "data/train/dropped.tsv").exists()
    corpus = read_stars(tmp_path, [*ROWS[:2], *ROWS[3:]])
    for fold in corpus.folds:
        fold.utterances = {u: type(v)(v.speaker, v.label) for u, v in fold.utterances.items()}
    import_corpus(lambda: corpus, options(tmp_path))
    assert {p.name for p in (tmp_path / "data/train").iterdir()} == {"utt2label", "utt2spk", "spk2utt", "scale.yaml"}
