"""Transcript quality: error rates, loops, refusals, empty answers."""

import pytest

from sdumc.pretrained.quality import find_loop, judge, normalise, summarise, word_error_rate


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
