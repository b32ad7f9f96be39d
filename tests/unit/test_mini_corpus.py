"""The mini corpus: sentences, voices, faces, the plan, and clips on disk."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest

import make_corpus
import make_data
from mini import corpus, face, sentences, speech
from mini import plan as planning
from mini.sentences import Clause, Sentence
from sdumc.data.kaldi_dir import load_kaldi_dir
from sdumc.data.media import probe, read_audio, read_frames
from sdumc.errors import UserError

SMALL = ["--num-pretrain", "3", "--num-train", "6", "--num-valid", "2", "--num-test", "2"]
SMALL += [
    "--num-pretrain-speakers",
    "1",
    "--num-train-speakers",
    "2",
    "--num-valid-speakers",
    "1",
    "--num-test-speakers",
    "1",
]


@pytest.fixture(scope="module")
def espeak():
    return pytest.importorskip("espeakng_loader")


@pytest.fixture(scope="module")
def plan():
    return planning.plan_corpus(planning.Settings())


@pytest.fixture(scope="module")
def small(tmp_path_factory, espeak):
    folder = tmp_path_factory.mktemp("mini") / "corpus"
    make_corpus.main(["--output-dir", str(folder), "--jobs", "2", *SMALL])
    return folder


def clause(degree, adjective):
    return Clause("book", degree, adjective)


@pytest.mark.parametrize(
    ("made_of", "joint", "expected"),
    [
        ([clause("", "excellent")], "", 1.5),
        ([clause("not", "excellent")], "", -1.05),
        ([clause("slightly", "ridiculous")], "", -0.75),
        ([clause("very", "terrible")], "", -2.97),
        ([clause("", "typical")], "", 0.0),
        ([clause("", "wonderful"), clause("", "terrible")], "and", 0.0),
        ([clause("", "wonderful"), clause("", "terrible")], "but", -1.1),
    ],
)
def test_sentiment_of_a_sentence(made_of, joint, expected):
    assert sentences.sentiment(Sentence("", tuple(made_of), joint, "")) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("opener", "closer", "expected"), [("i loved it", "", 1.85), ("", "what a waste", -0.35), ("honestly", "", 1.5)]
)
def test_a_remark_counts_as_much_as_a_clause(opener, closer, expected):
    sentence = Sentence(opener, (clause("", "excellent"),), "", closer)
    assert sentences.sentiment(sentence) == pytest.approx(expected)
    both = Sentence(opener, (clause("", "excellent"), clause("", "ridiculous")), "but", closer)
    remarks = [sentences.REMARKS[part] for part in (opener, closer) if part in sentences.REMARKS]
    assert sentences.sentiment(both) == pytest.approx((2 * -0.75 + sum(remarks)) / (2 + len(remarks)))


def test_opinions_are_said_as_often_as_in_mosi():
    """egs/mini/README.md has MOSI's shares: 24 to 36% of opinionated sentences have two opinions or more."""
    said, signs_agree = [], []
    for sentence in sentences.draw_sentences(np.random.default_rng(0), 4000):
        opinions = [c.value for c in sentence.clauses]
        opinions += [sentences.REMARKS[p] for p in (sentence.opener, sentence.closer) if p in sentences.REMARKS]
        signs = [value > 0 for value in opinions if value]
        said.append(len(signs))
        signs_agree += [len(set(signs)) == 1] if len(signs) > 1 else []
    opinionated = np.array([count for count in said if count])
    assert 0.24 <= np.mean(opinionated >= 2) <= 0.36 and 0.08 <= np.mean(opinionated >= 3) <= 0.14
    assert 0.6 < np.mean(signs_agree) < 0.9


def test_sentences_are_of_one_small_vocabulary():
    drawn = sentences.draw_sentences(np.random.default_rng(0), 300)
    words = set(sentences.vocabulary())
    assert 55 <= len(words) <= 110
    assert all(set(s.text.split()) <= words for s in drawn)
    assert len({s.text for s in drawn}) == 300
    assert 8 <= np.mean([len(s.text.split()) for s in drawn]) <= 12
    values = [sentences.sentiment(s) for s in drawn]
    assert min(values) >= -3 and max(values) <= 3 and np.std(values) > 0.8


def test_sentiment_is_not_a_sum_over_words():
    from sklearn.linear_model import RidgeCV

    drawn = sentences.draw_sentences(np.random.default_rng(0), 4000)
    words = sentences.vocabulary()
    x = np.array([[s.text.split().count(w) for w in words] for s in drawn], float)
    y = np.array([sentences.sentiment(s) for s in drawn])
    fit = RidgeCV(np.logspace(-2, 3, 6)).fit(x[:3000], y[:3000])
    assert fit.score(x[3000:], y[3000:]) < 0.7


def test_sets_share_words_but_neither_speakers_nor_sentences(plan):
    sets = {name: [c for c in plan if c.speaker.set == name] for name in planning.SETS}
    assert [len(sets[name]) for name in planning.SETS] == [400, 600, 150, 300]
    texts = {name: {c.text for c in clips} for name, clips in sets.items()}
    speakers = {name: {c.speaker.name for c in clips} for name, clips in sets.items()}
    for one, other in itertools.combinations(planning.SETS, 2):
        assert not texts[one] & texts[other]
        assert not speakers[one] & speakers[other]
    words = {name: {w for t in texts[name] for w in t.split()} for name in planning.SETS}
    assert words["train"] | words["valid"] | words["test"] <= words["pretrain"]
    assert len({c.utt for c in plan}) == len(plan)
    assert all(c.utt.startswith(c.speaker.name + "-") for c in plan)


def test_label_follows_text_voice_and_face_and_needs_all(plan):
    factors = np.array([[c.sentiment, c.arousal, c.expression] for c in plan])
    labels = np.array([c.label for c in plan])
    assert np.allclose(labels * 3, np.round(labels * 3)) and np.abs(labels).max() <= 3

    def explained(columns):
        x = np.column_stack([factors[:, columns], np.ones(len(plan))])
        residual = labels - x @ np.linalg.lstsq(x, labels, rcond=None)[0]
        return 1 - residual.var() / labels.var()

    text, voice, seen = explained([0]), explained([1]), explained([2])
    assert 0.6 < text < 0.92 and voice < 0.3 and seen < 0.35
    assert explained([0, 1]) > text + 0.02 and explained([0, 2]) > text + 0.04
    assert explained([0, 1, 2]) > 0.95


def test_label_is_clipped_and_in_thirds():
    assert planning.label_of(3.0, 1.0, 1.0, 0.0) == 3.0
    assert planning.label_of(-1.0, 0.0, 0.5, 0.0) == pytest.approx(-2 / 3)


def test_expression_is_brief():
    loudness = np.zeros(80)
    peaks, means = [], []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        peak = rng.uniform(-1, 1)
        track = face.expression_track(rng, peak, loudness, 25.0)
        assert track.shape == (80, 5)
        smile = track[:, 0]
        peaks.append((peak, smile[np.argmax(np.abs(smile))]))
        means.append((peak, smile.mean()))
    assert np.corrcoef(np.array(peaks).T)[0, 1] > np.corrcoef(np.array(means).T)[0, 1] + 0.05


def test_face_shows_its_expression():
    looks = face.draw_looks(np.random.default_rng(0))
    neutral = np.array([0, 0, 0.6, 0, 0])
    picture = face.draw_face(looks, neutral, 96)
    assert picture.shape == (96, 96, 3) and picture.dtype == np.uint8
    for column in range(5):
        changed = neutral.copy()
        changed[column] = 0.9 if column != 2 else 0.0
        assert np.abs(face.draw_face(looks, changed, 96).astype(int) - picture).sum() > 1000


def test_envelope():
    wave = np.concatenate([np.zeros(1600), np.ones(1600), 0.5 * np.ones(1600)]).astype(np.float32)
    assert np.allclose(speech.envelope(wave, 10.0, 3), [0.0, 1.0, 0.5])


def test_voices(espeak):
    synthesiser = speech.Synthesiser()
    slow = synthesiser.say("the book was good", speech.Voice("en-us+f1", 150, 50, 50), 1)
    fast = synthesiser.say("the book was good", speech.Voice("en-us+f1", 220, 50, 50), 1)
    assert slow.dtype == np.float32 and len(slow) > 1.2 * len(fast) > 0.4 * speech.RATE
    with pytest.raises(UserError, match="no voice 'xx-nobody'"):
        synthesiser.say("a", speech.Voice("xx-nobody", 150, 50, 50), 1)


def test_clips_have_sound_and_picture(small):
    rows = corpus.read_corpus(small)
    assert len(rows) == 13
    for row in rows[::3]:
        info = probe(row.clip)
        assert info.has_audio and info.has_video == (row.set != "pretrain")
        wave = read_audio(str(row.clip))
        assert 0.02 < wave.std() < 0.4
        if info.has_video:
            frames = list(read_frames(str(row.clip), None))
            assert frames[0][1].shape == (96, 96, 3)
            assert len(frames) / 10 == pytest.approx(len(wave) / 16000, abs=0.1)


def _digests(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*.*")}


def test_same_bytes_with_any_number_of_jobs(small, tmp_path):
    make_corpus.main(["--output-dir", str(tmp_path / "again"), "--jobs", "1", *SMALL])
    assert _digests(tmp_path / "again") == _digests(small)


def test_data_directories(small, tmp_path):
    make_data.main(["--corpus-dir", str(small), "--data-dir", str(tmp_path)])
    for name, count in (("pretrain", 3), ("train", 6), ("valid", 2), ("test", 2)):
        data = load_kaldi_dir(tmp_path / name)
        assert len(data.utterances) == count and set(data.text) == set(data.utterances)
        assert set(data.utt2label) == set(data.video) == (set() if name == "pretrain" else set(data.utterances))
        assert all(1 < data.utt2dur[u] < 6 for u in data.utterances)


def test_refusals(tmp_path, espeak):
    with pytest.raises(UserError, match="make the corpus first"):
        corpus.read_corpus(tmp_path)
    (tmp_path / "letters.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        make_corpus.main(["--output-dir", str(tmp_path), *SMALL])
    assert (tmp_path / "letters.txt").read_text() == "mine"
    (tmp_path / "corpus.tsv").write_text("\t".join(corpus.COLUMNS) + "\nspk01-0001\ttrain\n")
    with pytest.raises(UserError, match="line 2: 2 columns"):
        corpus.read_corpus(tmp_path)
    with pytest.raises(UserError, match="at least one speaker"):
        planning.plan_corpus(planning.Settings(test=2, test_speakers=3))


def test_nothing_appears_when_it_fails(tmp_path, monkeypatch, espeak):
    monkeypatch.setattr(planning, "voice_of", lambda clip: (speech.Voice("xx-nobody", 180, 50, 50), 0.1))
    with pytest.raises(UserError, match="no voice"):
        make_corpus.main(["--output-dir", str(tmp_path / "corpus"), *SMALL])
    assert not (tmp_path / "corpus").exists()
