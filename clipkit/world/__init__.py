"""Procedural scenes with exact ground truth: pictures at any size, captions, and a judge without a network.

    scene = sample("train", seed=0, index=3)      # one to three objects, counts, relations, background, style
    picture = render(scene, 64).image             # with masks, edges and boxes
    caption = captions(scene)[0]                  # its text, and the facts that it states
    check(picture, caption.facts, scene.style)    # fact -> whether the picture shows it

The first edition, one object a picture, is `clipkit.data.drawings`; its bytes stay as they are.
"""

from clipkit.world.captions import Caption, captions
from clipkit.world.judge import Found, check, find
from clipkit.world.render import Rendered, check_size, render
from clipkit.world.scene import STYLES, Fact, Object, Scene, facts, sample

__all__ = [
    "STYLES",
    "Caption",
    "Fact",
    "Found",
    "Object",
    "Rendered",
    "Scene",
    "captions",
    "check",
    "check_size",
    "facts",
    "find",
    "render",
    "sample",
]
