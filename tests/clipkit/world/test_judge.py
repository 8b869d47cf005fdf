"""The judge against the truth: right on the renderer's pictures, wrong on other ones, silent on what shows nothing."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter

from clipkit.errors import UsageError
from clipkit.world import STYLES, Object, Scene, check, facts, find, render, sample
from clipkit.world.judge import background_of, styles_of

COUNT = 40


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [24, 96])
def test_renders_show_what_they_show(style, size):
    right, total = Counter(), Counter()
    for i in range(COUNT if style in ("flat", "pixels", "inverted") else COUNT // 4):
        scene = sample("heldout" if i % 2 else "train", 0, i, (style,))
        stated = [f for f in facts(scene) if f.kind != "style"]
        for fact, shown in check(render(scene, size).image, stated, style).items():
            total[fact.kind] += 1
            right[fact.kind] += shown
    assert right.total() >= 0.99 * total.total(), {k: right[k] / total[k] for k in total}


def test_pictures_of_something_else_do_not_show_it():
    wrong = total = 0
    for i in range(COUNT):
        there, asked = sample("train", 1, i), sample("train", 2, i)
        stated = [f for f in facts(asked) if f.kind in ("object", "colour") and f not in facts(there)]
        found = {o.shape for o in there.objects}
        for fact, shown in check(render(there, 24).image, stated).items():
            if fact.kind == "colour" or fact.value not in found:
                total, wrong = total + 1, wrong + shown
    assert total > COUNT
    assert wrong <= 0.01 * total


def test_noise_and_blur_show_nothing():
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (n, n, 3), dtype=np.uint8)) for n in (24, 48, 96) for _ in range(8)]
    assert not any(map(find, noise))
    blurred = [render(sample("train", 3, i), 64).image.filter(ImageFilter.GaussianBlur(8)) for i in range(30)]
    assert sum(map(bool, map(find, blurred))) <= 1
    assert not find(Image.new("RGB", (24, 24), "white"))


def test_wrong_counts_sizes_places_and_relations_are_seen():
    rocket, star = Object("rocket", "red", 0.25, 0.5, 0.2), Object("star", "blue", 0.75, 0.5, 0.2)
    there = Scene((rocket, star), "white")
    swapped = Scene((Object("rocket", "red", 0.75, 0.5, 0.2), Object("star", "blue", 0.25, 0.5, 0.2)), "white")
    twice = Scene((rocket, Object("rocket", "red", 0.75, 0.5, 0.2)), "white")
    picture = render(there, 48).image
    relation = [f for f in facts(swapped) if f.kind == "relation"]
    assert list(check(picture, relation).values()) == [False]
    assert list(check(picture, [f for f in facts(twice) if f.kind == "count"]).values()) == [False]
    big, small = (
        Scene((Object("cup", "red", 0.5, 0.5, 0.44),), "black"),
        Scene((Object("cup", "red", 0.5, 0.5, 0.34),), "black"),
    )
    assert list(check(render(big, 48).image, [f for f in facts(small) if f.kind == "size"]).values()) == [False]
    placed = Scene((Object("cup", "red", 0.25, 0.5, 0.2),), "black")
    assert list(check(render(big, 48).image, [f for f in facts(placed) if f.kind == "place"]).values()) == [False]
    assert background_of(picture) == "white"


def test_a_count_is_of_all_colours_unless_two_are_asked_for():
    stars = [Object("star", c, x, 0.5, 0.18) for c, x in (("blue", 0.25), ("red", 0.75))]
    picture = render(Scene(tuple(stars), "white"), 48).image
    one_blue = [f for f in facts(Scene((stars[0],), "white")) if f.kind == "count"]
    both = [f for f in facts(Scene(tuple(stars), "white")) if f.kind == "count"]
    assert list(check(picture, one_blue).values()) == [False]
    assert list(check(picture, both).values()) == [True, True]


@pytest.mark.parametrize("style", STYLES)
def test_styles_are_told_apart(style):
    for i in range(4):
        assert styles_of(render(sample("train", 4, i, (style,)), 96).image) == {style}


def test_small_pictures_cannot_tell_flat_from_pixels():
    assert styles_of(render(sample("train", 4, 0), 24).image) == {"flat", "pixels"}


def test_directions_need_frames():
    scene = Scene((Object("car", "red", 0.3, 0.5, 0.2, "right"),), "white")
    moves = [f for f in facts(scene) if f.kind == "direction"]
    frames = [render(scene, 48, t).image for t in (0, 0.5, 1)]
    assert list(check(frames, moves).values()) == [True]
    assert list(check(frames[::-1], moves).values()) == [False]
    assert list(check([frames[0], frames[0]], moves).values()) == [False]
    with pytest.raises(UsageError, match="frames of two times"):
        check(frames[0], moves)


def test_an_unknown_style_is_refused():
    with pytest.raises(UsageError, match="unknown style 'oil'"):
        find(Image.new("RGB", (24, 24)), "oil")
