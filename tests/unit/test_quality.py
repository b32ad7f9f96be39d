"""Transcript quality: error rates, loops, refusals, empty answers."""

import numpy as np
import pytest

from sdumc.pretrained.quality import Sounds, find_loop, judge, normalise, sketch, summarise, word_error_rate


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don’t STOP, please!", "don't stop please"),
        ("a well-known thing — really", "a well known thing really"),
        ("'quoted' dogs'", "quoted dogs"),
        ("  tabs\tand\nlines ", "tabs and lines"),
        ("...", ""),
        ("Ｆｕｌｌ１", "full1"),
        ("很好", "很好"),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


def test_word_error_rate_is_over_the_corpus():
    references = {"a": "One two three.", "b": "four", "c": "!!!", "d": "only here"}
    result = word_error_rate(references, {"a": "one too three", "b": "", "c": "word"})
    assert result["wer"] == pytest.approx(2 / 4)
    assert (result["substitutions"], result["deletions"], result["insertions"]) == (1, 1, 0)
    assert result["utterances"] == 2
    assert word_error_rate({}, {})["wer"] is None


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("it was very very very good", None),
        ("no no no no no no", None),
        ("i loved it i loved it i loved it", None),
        ("so " + "good " * 30, 2),
        ("well " + "i like it " * 20, 4),
        ("a b c d e " + "one two three four five six seven eight " * 4, 13),
        ("word " * 16, 1),
    ],
)
def test_find_loop(text, keep):
    assert find_loop(text.split()) == keep


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("I'm an AI language model and cannot listen to audio.", "refusal"),
        ("As an AI, I do not have opinions", "refusal"),
        ("I’m sorry, but I cannot assist with that request.", "refusal"),
        ("I am unable to transcribe the audio you mention", "refusal"),
        ("Please provide the audio file.", "refusal"),
        ("No speech was provided", "refusal"),
        ("I'm sorry, but I did not like this movie", "ok"),
        ("i cannot recommend this film", "ok"),
        ("please provide better popcorn", "ok"),
        ("the sound was bad and you can't hear the actors", "ok"),
        ("", "empty"),
        (" ... ", "empty"),
        ("bad " * 40, "repeat"),
    ],
)
def test_judge(text, status):
    words = text.split()
    found, kept = judge(text, words)
    assert found == status
    assert kept == {"ok": len(words), "repeat": 1}.get(status, 0)


def test_judge_unfinished():
    assert judge("one two three", ["one", "two", "three"], ended=False) == ("limit", 3)
    assert judge("a b c a b c a b c", "abcabcabc", ended=False) == ("repeat", 3)


def test_summarise_counts_everything():
    report = summarise({"a": "ok", "b": "repeat", "c": "ok"}, {"a": "none", "b": "cut", "c": "none"})
    assert report["counts"] == {"ok": 2, "empty": 0, "no-speech": 0, "refusal": 0, "repeat": 1, "limit": 0}
    assert report["fallbacks"] == {"cut": 1}
    assert report["n"] == 3


def test_sketches_are_the_same_for_ever():
    """The yaml of a train set holds them: another version must not make others."""
    assert sketch(np.arange(4.0))[:3] == pytest.approx([-0.2507, 1.2866, -1.6138], abs=1e-3)
    assert sketch(np.ones(5)).shape == (32,)


def test_sound_unlike_a_set_s():
    """In a set of 40 voices, other clips of new voices count as strange in about one of a hundred, shifted ones do."""
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(32, 32))

    def clips(voices, each, first=0):
        voice = np.repeat(2 * rng.normal(size=(voices, 32)), each, axis=0)
        names = [f"voice{first + i // each}" for i in range(voices * each)]
        return (voice + rng.normal(size=voice.shape)) @ spread, names

    train, names = clips(40, 10)
    sounds = Sounds.of(train, names)
    new, _ = clips(100, 3)
    share = float(np.mean([sounds.strange(x) for x in new]))
    assert share < 0.04
    assert np.mean([sounds.strange(x) for x in train]) <= 0.01
    # Measured against its own voice's clips, too many of new ones would be strange.
    assert sounds.limit > np.percentile(Sounds.of(train, [str(i) for i in range(400)]).distances(train), 99)
    shifted = new + 8 * np.std(train, axis=0)
    assert np.mean([sounds.strange(x) for x in shifted]) > 0.9
    assert not sounds.strange(None)

    again = Sounds.from_dict(sounds.as_dict())
    np.testing.assert_allclose(again.distances(new), sounds.distances(new), rtol=1e-2)
    assert Sounds.of(train[:49], names[:49]) is None  # too few to say
    assert Sounds.of(train[:50], ["one"] * 50) is not None
