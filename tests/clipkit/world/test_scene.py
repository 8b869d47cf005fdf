"""Scenes: a function of (split, seed, index), what each split holds, and the facts of a scene."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipkit.data.drawings import held_out
from clipkit.errors import UsageError
from clipkit.world import STYLES, Object, Scene, facts, sample
from clipkit.world.scene import RELATIONS, SHAPES, related, relation_held_out

SEEDS = st.integers(0, 10_000)


def relations(scene):
    for a, b in itertools.permutations(scene.groups, 2):
        yield from ((a[0].shape, r, b[0].shape) for r in RELATIONS if related(a, b, r))


@given(SEEDS, st.sampled_from(("train", "val", "heldout", "relations")))
def test_a_scene_is_a_function_of_split_seed_and_index(index, split):
    scene = sample(split, 3, index, STYLES)
    assert scene == sample(split, 3, index, STYLES)
    assert scene != sample(split, 4, index, STYLES)
    assert 1 <= len(scene.objects) <= 3


@given(SEEDS, st.sampled_from(("train", "val")))
def test_what_is_trained_on_has_nothing_held_out(index, split):
    scene = sample(split, 0, index)
    assert not any(held_out(o.shape, o.colour) for o in scene.objects)
    assert not any(relation_held_out(*r) for r in relations(scene))


@given(SEEDS)
def test_held_out_splits_hold_what_is_not_trained_on(index):
    assert any(held_out(o.shape, o.colour) for o in sample("heldout", 0, index).objects)
    unseen = sample("relations", 0, index)
    assert any(relation_held_out(*r) for r in relations(unseen))
    assert not any(held_out(o.shape, o.colour) for o in unseen.objects)


@given(SEEDS)
def test_objects_lie_inside_and_apart(index):
    objects = sample("train", 1, index).objects
    for o in objects:
        assert o.radius <= o.x <= 1 - o.radius
        assert o.radius <= o.y <= 1 - o.radius
    for a, b in itertools.combinations(objects, 2):
        assert (a.x - b.x) ** 2 + (a.y - b.y) ** 2 > (a.radius + b.radius) ** 2


def test_an_eighth_of_the_relations_is_held_out():
    held = [relation_held_out(a, r, b) for a in SHAPES for b in SHAPES for r in RELATIONS]
    assert sum(held) / len(held) == 1 / 8


def test_facts_of_a_scene_by_hand():
    star = Object("star", "blue", 0.7, 0.3, 0.2)
    scene = Scene(
        (Object("rocket", "red", 0.2, 0.5, 0.2), star, Object("star", "blue", 0.8, 0.8, 0.2)), "grey", "outline"
    )
    assert [str(f) for f in facts(scene)] == [
        "object of red rocket: rocket",
        "colour of red rocket: red",
        "count of red rocket: 1",
        "object of blue star: star",
        "colour of blue star: blue",
        "count of blue star: 2",
        "relation of red rocket and blue star: left of",
        "background: grey",
        "style: outline",
    ]


@pytest.mark.parametrize(
    ("x", "y", "place"),
    [(0.2, 0.5, "left"), (0.8, 0.45, "right"), (0.5, 0.2, "top"), (0.45, 0.8, "bottom"), (0.5, 0.5, "")],
)
def test_places(x, y, place):
    assert Object("star", "blue", x, y, 0.2).place == place


def test_moving_objects_move_with_time():
    scene = sample("train", 0, 5, moving=True)
    before, after = scene.at(0).objects[0], scene.at(1).objects[0]
    assert (before.x, before.y) == (scene.objects[0].x, scene.objects[0].y)
    assert (after.x, after.y) != (before.x, before.y)
    assert any(f.kind == "direction" for f in facts(scene))


def test_unknown_names_are_refused():
    with pytest.raises(UsageError, match="unknown split 'trian'; did you mean 'train'"):
        sample("trian", 0, 0)
    with pytest.raises(UsageError, match="unknown style 'flatt'; did you mean 'flat'"):
        sample("train", 0, 0, ("flatt",))
