"""Captions: in plain English, true of their scene, and they state what they say."""

from hypothesis import given
from hypothesis import strategies as st

from clipkit.world import STYLES, Object, Scene, captions, facts, sample


@given(st.integers(0, 10_000), st.sampled_from(STYLES))
def test_every_stated_fact_is_true(index, style):
    scene = sample("train", 0, index, (style,))
    true = set(facts(scene))
    found = captions(scene)
    assert len({c.text for c in found}) == len(found)
    for caption in found:
        assert caption.facts
        assert set(caption.facts) <= true


def test_phrasings_by_hand():
    rocket, one, two = (
        Object("rocket", "red", 0.2, 0.5, 0.18),
        Object("star", "blue", 0.7, 0.2, 0.18),
        Object("star", "blue", 0.75, 0.8, 0.18),
    )
    texts = [c.text for c in captions(Scene((rocket, one, two), "white"))]
    assert texts[0] == "a red rocket and two blue stars"
    assert "a red rocket left of two blue stars" in texts
    assert "two blue stars right of a red rocket on a white background" in texts
    assert "a drawing of a red rocket to the left of two blue stars" in texts
    single = [c.text for c in captions(Scene((Object("umbrella", "orange", 0.2, 0.5, 0.2),), "black", "outline"))]
    assert single[0] == "an outline of an orange umbrella"
    assert "a line drawing of a small orange umbrella" in single
    assert "an outline of an orange umbrella on the left on black" in single
    fish = Object("fish", "red", 0.3, 0.3, 0.2)
    assert captions(Scene((fish, Object("fish", "red", 0.7, 0.7, 0.2)), "white"))[0].text == "two red fish"


def test_a_caption_states_no_more_than_it_says():
    scene = Scene((Object("rocket", "red", 0.5, 0.5, 0.43),), "white")
    kinds = {c.text: {f.kind for f in c.facts} for c in captions(scene)}
    assert kinds["a rocket"] == {"object", "count"}
    assert kinds["a red rocket"] == {"object", "colour", "count"}
    assert kinds["a big red rocket on white"] == {"object", "colour", "count", "size", "background"}
    assert kinds["a flat drawing of a red rocket"] == {"object", "colour", "count", "style"}
