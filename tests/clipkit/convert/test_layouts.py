"""Tables of weight names: import and export are inverse to each other, for every layout and every row."""

import pytest
import torch
from external_models import CONFIGS, TEXT, theirs
from hypothesis import given
from hypothesis import strategies as st

from clipkit.convert import layouts
from clipkit.convert.renaming import SAME, SCALAR, SCALAR_1D, TOKEN, Layout, Row
from clipkit.errors import CheckpointError

LAYOUTS = {
    "OpenAI and open_clip ViT": layouts.open_clip_vit(),
    "open_clip ViT, text projection with a bias": layouts.open_clip_vit(text_bias=True),
    "OpenAI ResNet": layouts.open_clip_resnet(),
    "open_clip timm": layouts.open_clip_timm(),
    "open_clip timm, classifier as projection": layouts.open_clip_timm(classifier="head.fc"),
    "transformers CLIP": layouts.TRANSFORMERS_CLIP,
    "transformers SigLIP": layouts.TRANSFORMERS_SIGLIP,
    "diffusers, one block": layouts.diffusers_autoencoder(1),
    "diffusers, two blocks": layouts.diffusers_autoencoder(2),
}
_SHAPES = {SCALAR: (), SCALAR_1D: (1,), TOKEN: (6,)}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def filled(row, i, j, rest):
    """Tensors of a row under their names."""
    names = [name.replace("{i}", str(i)).replace("{j}", str(j)).replace("*", rest) for name in row.theirs]
    return {name: torch.rand(_SHAPES.get(row.change, (6, 4))) for name in names}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@given(data=st.data())
def test_import_and_export_are_inverse(layout, data):
    rows = data.draw(st.lists(st.sampled_from(layout.rows), min_size=1, max_size=12, unique=True))
    y = {}
    for row in rows:
        i, rest = data.draw(st.integers(0, 11)), data.draw(st.sampled_from(["weight", "bias"]))
        y |= filled(row, i, 0, rest)  # residual blocks of diffusers are counted to `blocks`
    x = layout.to_ours(y)
    assert equal(layout.to_theirs(x), y)
    assert equal(layout.to_ours(layout.to_theirs(x)), x)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_names_of_older_files_are_read_and_never_written(layout):
    for row in layout.legacy:
        y = filled(row, 1, 0, "weight")
        assert not layout.to_theirs(layout.to_ours(y)).keys() & {name for name in y if name.startswith("text.")}
        assert layout.to_ours(y)


def published(kind):
    """The state dict of the library that has the layout, and the layout."""
    if kind in CONFIGS:
        pytest.importorskip("open_clip")
        model = theirs({**CONFIGS[kind], "text_cfg": TEXT})
        return model.state_dict(), layouts.open_clip_resnet() if kind == "RN50" else layouts.open_clip_vit()
    if kind == "AutoencoderKL":
        widths, blocks = (32, 64), ("DownEncoderBlock2D",) * 2
        model = pytest.importorskip("diffusers").AutoencoderKL(
            block_out_channels=widths, down_block_types=blocks, up_block_types=("UpDecoderBlock2D",) * 2
        )
        return model.state_dict(), layouts.diffusers_autoencoder(1)
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(
        vision_config={**small, "image_size": 32, "patch_size": 16}, text_config={**small, "vocab_size": 60}
    )
    layout = layouts.TRANSFORMERS_CLIP if kind == "CLIP" else layouts.TRANSFORMERS_SIGLIP
    return getattr(transformers, f"{kind}Model")(config).state_dict(), layout


@pytest.mark.parametrize("kind", ["ViT-B-32", "RN50", "CLIP", "Siglip", "AutoencoderKL"])
def test_state_dicts_of_the_libraries_survive_both_ways(kind):
    y, layout = published(kind)
    back = layout.to_theirs(layout.to_ours(y))
    ignored = {name for name in y if name.endswith(("position_ids", "attn_mask"))}
    assert back.keys() == y.keys() - ignored
    assert all(torch.equal(back[name], y[name]) for name in back)


def test_names_that_no_row_knows_are_refused():
    layout = Layout((Row("a.{i}.*", "b.{i}.*"), Row(("q", "k"), "qk", layouts._QKV)))
    with pytest.raises(CheckpointError, match=r"^2 tensors belong to another architecture: c, a\.x\.weight$"):
        layout.to_ours({"c": torch.zeros(1), "a.1.weight": torch.zeros(1), "a.x.weight": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="there is no tensor 'k'"):
        layout.to_ours({"q": torch.zeros(1)})
    assert Row("a", "b").change is SAME
