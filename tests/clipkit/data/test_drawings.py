import hashlib

import numpy as np
import pytest

from clipkit.data.drawings import ALIASES, COLOURS, OBJECTS, PAIRS, SPLITS, draw
from clipkit.errors import UsageError


def test_the_world_is_big_enough():
    assert len(OBJECTS) >= 16
    assert len(COLOURS) >= 8
    assert "rocket" in OBJECTS


def test_whole_pairs_are_held_out_evenly():
    held = set(SPLITS["heldout"])
    assert not held & set(SPLITS["train"])
    assert held | set(SPLITS["train"]) == set(PAIRS)
    assert sorted(o for o, _ in held) == sorted(OBJECTS)
    assert all(sum(c == colour for _, c in held) == 2 for colour in COLOURS)


def test_a_seed_means_the_same_bytes():
    def digest(seed):
        return hashlib.sha256(b"".join(draw("train", seed, i).image.tobytes() for i in range(20))).hexdigest()

    assert digest(0) == digest(0)
    assert digest(0) != digest(1)


def test_captions_are_true_and_only_some_tell_the_colour():
    for i in range(112):
        drawing = draw("train", 3, i)
        object_, colour = PAIRS[drawing.label]
        assert all(object_ in c for c in drawing.captions[:-1])
        assert any(drawing.captions[-1].endswith(f"{colour} {alias}") for alias in ALIASES[object_])
        assert not any(other in c.split() for c in drawing.captions for other in COLOURS if other != colour)
        assert 0 < sum(colour in c for c in drawing.captions) < len(drawing.captions)


def test_the_colour_is_in_the_picture_and_the_object_inside_the_frame():
    for i in range(112):
        drawing = draw("val", 0, i, size=64)
        pixels = np.asarray(drawing.image).reshape(-1, 3)
        assert (pixels == COLOURS[PAIRS[drawing.label][1]]).all(1).sum() > 40
        edge = np.asarray(drawing.image)[[0, -1]].reshape(-1, 3)
        assert len(np.unique(edge, axis=0)) == 1


def test_unknown_split():
    with pytest.raises(UsageError, match="known: train, val, heldout"):
        draw("test", 0, 0)
