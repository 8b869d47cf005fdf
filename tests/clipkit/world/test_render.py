"""Pictures of scenes and their truth."""

import numpy as np
import pytest
from PIL import Image

from clipkit.data.drawings import BACKGROUNDS, COLOURS
from clipkit.errors import UsageError
from clipkit.world import STYLES, Object, Scene, render, sample


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("size", [24, 65, 256])
def test_sizes_shapes_and_types(style, size):
    scene = sample("train", 0, 1, (style,))
    drawn = render(scene, size)
    assert drawn.image.size == (size, size)
    assert drawn.image.mode == "RGB"
    assert drawn.masks.shape == (len(scene.objects), size, size)
    assert drawn.edges.shape == (size, size)
    assert drawn.masks.dtype == drawn.edges.dtype == np.float32
    assert drawn.masks.min() >= 0
    assert drawn.masks.max() == 1


def test_masks_say_where_the_colour_is():
    """Outside of all masks lies the background, inside of a heart's its colour."""
    scene = Scene((Object("heart", "red", 0.3, 0.3, 0.2), Object("star", "blue", 0.7, 0.7, 0.2)), "grey")
    drawn = render(scene, 64)
    pixels = np.asarray(drawn.image)
    assert (pixels[drawn.masks.sum(0) == 0] == BACKGROUNDS["grey"]).all()
    for mask, colour in zip(drawn.masks, ("red", "blue"), strict=True):
        assert (pixels[mask == 1] == COLOURS[colour]).all()


def test_boxes_are_those_of_the_masks():
    drawn = render(sample("train", 0, 1), 96)
    for mask, (left, top, right, bottom) in zip(drawn.masks, drawn.boxes, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert (int(left), int(top)) == (columns[0], rows[0])
        assert (int(np.ceil(right)), int(np.ceil(bottom))) == (columns[-1] + 1, rows[-1] + 1)


def test_edges_lie_where_the_picture_changes():
    scene = Scene((Object("heart", "red", 0.5, 0.5, 0.4),), "white")
    edges, mask = render(scene, 96).edges, render(scene, 96).masks[0]
    inner = (mask[1:-1, 1:-1] == 1) & (mask[:-2, 1:-1] == 1) & (mask[2:, 1:-1] == 1)
    assert edges[mask == 0].max() == 0
    assert edges[(mask > 0) & (mask < 1)].mean() > 0.3
    assert edges[1:-1, 1:-1][inner].mean() < 0.1


def test_styles_by_their_definition():
    flat = Scene((Object("heart", "red", 0.5, 0.5, 0.4),), "white")
    pixels = {s: np.asarray(render(Scene(flat.objects, "white", s), 96).image).astype(int) for s in STYLES}
    assert (pixels["inverted"] == 255 - pixels["flat"]).all()
    assert (pixels["outline"][48, 48] == 255).all()  # nothing inside
    share = {s: float((p[:, :, 1] < 128).mean()) for s, p in pixels.items()}
    assert share["outline"] < share["hatched"] < share["flat"]
    blocks = pixels["pixels"].reshape(24, 4, 24, 4, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()


def test_the_same_scene_at_two_sizes_is_the_same_picture():
    scene = sample("train", 0, 1)
    small = np.asarray(render(scene, 32).image, float)
    large = np.asarray(render(scene, 128).image.resize((32, 32), Image.Resampling.BOX), float)
    assert np.abs(small - large).mean() < 1.5


def test_time_moves_the_picture():
    scene = Scene((Object("heart", "red", 0.3, 0.5, 0.2, "right"),), "white")
    left, _, right, _ = render(scene, 64, time=1).boxes[0]
    before = render(scene, 64).boxes[0]
    assert (left - before[0], right - before[2]) == (16, 16)


@pytest.mark.parametrize("size", [7, 1025])
def test_sizes_beyond_the_range_are_refused(size):
    with pytest.raises(UsageError, match="8 to 1024 pixels"):
        render(sample("train", 0, 0), size)
