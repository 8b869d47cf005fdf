"""Words of captions and prompts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.models.words import EMPTY, split, unknown


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A red ROCKET, don't!", ["a", "red", "rocket", "don", "t"]),
        ("snake_case 10:30", ["snake_case", "10", "30"]),
        ("ein Wei\u00dfes Haus \u2014 \u201csch\u00f6n\u201d\u2026", ["ein", "wei\u00dfes", "haus", "sch\u00f6n"]),
        ("a \U0001f680\U0001f525 now", ["a", "\U0001f680\U0001f525", "now"]),
        ("\U0001f468\u200d\U0001f469\u200d\U0001f467", ["\U0001f468\u200d\U0001f469\u200d\U0001f467"]),
        ("\u732b and \u043a\u043e\u0442", ["\u732b", "and", "\u043a\u043e\u0442"]),
        ("cafe\u0301", ["caf\u00e9"]),
        ("+-*/ ...", []),
    ],
)
def test_words_and_symbols(text, words):
    assert split(text) == words


@given(st.text(st.characters(max_codepoint=127)))
def test_the_words_of_ascii_are_those_of_old_vocabularies(text):
    import re

    assert split(text) == re.findall(r"\w+", text.lower())


@given(st.lists(st.text()))
def test_unknown_words_are_each_named_once_in_order_and_known_ones_never(texts):
    known = split(" ".join(texts))[::2]
    found = unknown(texts, known)
    if not known:
        assert found == []
    assert len(found) == len(set(found))
    assert not set(found) & (set(known) | EMPTY)


def test_scripts_and_emoji_that_no_caption_had():
    known = ["red", "rocket"]
    texts = ["a red \U0001f680", "\u732b \u0440\u0430\u043a\u0435\u0442\u0430", "a rocket"]
    assert unknown(texts, known) == ["\U0001f680", "\u732b", "\u0440\u0430\u043a\u0435\u0442\u0430"]
    assert unknown(texts, []) == []  # what it learned from was not recorded


def test_decomposed_letters_are_the_same_words():
    assert split("cafe\u0301") == split("café") == ["café"]
