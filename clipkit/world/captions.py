"""Captions of scenes, each with the facts that it states."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from clipkit.data.drawings import ALIASES
from clipkit.world.scene import RELATIONS, Fact, Object, Scene, related

_NUMBERS = {1: "one", 2: "two", 3: "three"}
_OPPOSITE = {"left of": "right of", "above": "below"}
_STYLED = {
    "flat": ("{}", "a drawing of {}", "a flat drawing of {}"),
    "outline": ("an outline of {}", "a line drawing of {}", "an outline drawing of {}"),
    "hatched": ("a hatched drawing of {}", "a striped drawing of {}", "a drawing of {} in stripes"),
    "pixels": ("pixel art of {}", "a pixelated drawing of {}", "{} in pixels"),
    "inverted": ("a negative of {}", "an inverted drawing of {}", "{} in inverted colours"),
}
"""Phrasings of each style; the first of "flat" does not mention it."""
_PLACED = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}


@dataclass(frozen=True)
class Caption:
    """A caption that is true of a scene, and the facts that it states."""

    text: str
    facts: tuple[Fact, ...]


def captions(scene: Scene) -> tuple[Caption, ...]:
    """Every caption that the grammar has for a scene, the plainest first; all of them are true."""
    groups = scene.groups
    found: list[Caption] = []
    for phrase, stated in _phrases(scene):
        for k, styled in enumerate(_STYLED[scene.style]):
            tells = scene.style != "flat" or "flat" in styled
            style = (Fact("style", (), scene.style),) if tells else ()
            text = styled.format(phrase)
            found.append(Caption(text, (*stated, *style)))
            if k == 0:
                on = (Fact("background", (), scene.background),)
                found.append(Caption(f"{text} on a {scene.background} background", (*stated, *style, *on)))
                found.append(Caption(f"{text} on {scene.background}", (*stated, *style, *on)))
    if len(groups) == 1 and scene.style == "flat":
        found += _loose(groups[0])
    return tuple(found)


def _phrases(scene: Scene) -> Iterator[tuple[str, tuple[Fact, ...]]]:
    """Noun phrases for the whole scene, without style and background."""
    groups = scene.groups
    stated_of = [_facts_of(g) for g in groups]
    yield _listed([_noun(g) for g in groups]), tuple(itertools.chain(*stated_of))
    if len(groups) == 1 and len(groups[0]) == 1:
        one, of = groups[0][0], ((groups[0][0].shape, groups[0][0].colour),)
        size = (Fact("size", of, one.size),)
        yield _noun(groups[0], adjective=one.size), (*stated_of[0], *size)
        if one.place:
            place = (Fact("place", of, one.place),)
            yield f"{_noun(groups[0])} {_PLACED[one.place]}", (*stated_of[0], *place)
    for a, b in itertools.permutations(range(len(groups)), 2):
        for relation in RELATIONS:
            if len(groups) == 2 and related(groups[a], groups[b], relation):
                both = tuple((groups[k][0].shape, groups[k][0].colour) for k in (a, b))
                stated = (*stated_of[a], *stated_of[b], Fact("relation", both, relation))
                first, second = _noun(groups[a]), _noun(groups[b])
                yield f"{first} {relation} {second}", stated
                yield f"{second} {_OPPOSITE[relation]} {first}", stated
                if relation == "left of":
                    yield f"{first} to the left of {second}", stated


def _facts_of(group: tuple[Object, ...]) -> tuple[Fact, ...]:
    of = ((group[0].shape, group[0].colour),)
    kinds = Fact("object", of, group[0].shape), Fact("colour", of, group[0].colour)
    return (*kinds, Fact("count", of, str(len(group))))


def _loose(group: tuple[Object, ...]) -> list[Caption]:
    """Captions without the colour or the name of the object."""
    one, n = group[0], len(group)
    of = ((one.shape, one.colour),)
    shape, count = Fact("object", of, one.shape), Fact("count", of, str(n))
    bare = f"{_article(one.shape)} {one.shape}" if n == 1 else f"{_NUMBERS[n]} {plural(one.shape)}"
    found = [Caption(bare, (shape, count))]
    if n == 1:
        found += [
            Caption(f"{_article(one.colour)} {one.colour} {alias}", _facts_of(group)) for alias in ALIASES[one.shape]
        ]
    return found


def _noun(group: tuple[Object, ...], adjective: str = "") -> str:
    """ "a red rocket", "two blue stars"."""
    one = group[0]
    words = f"{adjective} {one.colour}".strip()
    if len(group) == 1:
        return f"{_article(words)} {words} {one.shape}"
    return f"{_NUMBERS[len(group)]} {words} {plural(one.shape)}"


def plural(shape: str) -> str:
    """More than one of a shape."""
    return {"fish": "fish"}.get(shape, f"{shape}s")


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def _listed(nouns: list[str]) -> str:
    return nouns[0] if len(nouns) == 1 else f"{', '.join(nouns[:-1])} and {nouns[-1]}"
