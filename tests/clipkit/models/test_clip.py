import dataclasses

import pytest
import torch
import torch.nn.functional as F

from clipkit.errors import RecipeError
from clipkit.models.clip import CLIP, CLIPConfig, ImageTower, TextTower

TINY = {"embed_dim": 16, "text_width": 32, "text_layers": 2, "text_heads": 2, "context_length": 12}
CNN = CLIPConfig("convnext_atto", 32, {"patch_size": 2, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}, **TINY)
VIT = CLIPConfig("vit_tiny_patch16_224", 32, {"patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}, **TINY)
END = 2


def ids(*lengths, width=None):
    rows = torch.zeros(len(lengths), width or max(lengths), dtype=torch.int64)
    for row, n in zip(rows, lengths, strict=True):
        row[:n] = torch.randint(5, 50, (n,))
        row[0], row[n - 1] = 1, END
    return rows


@pytest.mark.parametrize("config", [CNN, VIT], ids=["cnn", "vit"])
def test_features_are_unit_vectors_and_gradients_reach_everything(config):
    model = CLIP(config, 50, END)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    image, text = model.encode_image(images), model.encode_text(ids(4, 6, 5))
    assert image.shape == text.shape == (3, 16)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(3))
    (image * text).sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert without == ["log_logit_scale"]


def test_uint8_and_unit_floats_are_the_same_image():
    tower = ImageTower(CNN).eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(tower(images), tower(images.float() / 255))


def test_text_costs_what_it_contains():
    """Cut to the longest caption or padded to the full context, with zeros or rubbish: the same features."""
    tower = TextTower(CNN, 50, END).double()
    short = ids(4, 7)
    padded, rubbish = ids(4, 7, width=12), torch.randint(5, 50, (2, 12))
    padded[:, :7] = short
    rubbish[:, :7] = short
    for other in (padded, rubbish):
        torch.testing.assert_close(tower(other), tower(short), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(tower(short[:1, :4]), tower(short)[:1], rtol=1e-10, atol=1e-12)


def test_text_attention_is_causal():
    tower = TextTower(CNN, 50, END)
    one, other = ids(9), None
    other = one.clone()
    other[0, 8] = 7  # END moves out: read at position 0, before anything that differs
    one[0, 4], other[0, 4] = END, END
    torch.testing.assert_close(tower(one), tower(other))


def test_text_blocks_equal_torchs_own_transformer_layer():
    tower = TextTower(CNN, 50, END).eval()
    block = tower.blocks[0]
    layer = torch.nn.TransformerEncoderLayer(32, 2, 128, 0.0, F.gelu, batch_first=True, norm_first=True).eval()
    layer.load_state_dict(
        {
            "self_attn.in_proj_weight": block.qkv.weight,
            "self_attn.in_proj_bias": block.qkv.bias,
            "self_attn.out_proj.weight": block.out.weight,
            "self_attn.out_proj.bias": block.out.bias,
            "linear1.weight": block.mlp[0].weight,
            "linear1.bias": block.mlp[0].bias,
            "linear2.weight": block.mlp[2].weight,
            "linear2.bias": block.mlp[2].bias,
            "norm1.weight": block.norm1.weight,
            "norm1.bias": block.norm1.bias,
            "norm2.weight": block.norm2.weight,
            "norm2.bias": block.norm2.bias,
        }
    )
    x = torch.randn(2, 6, 32)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(6)
    ours = block(x.flatten(0, 1), torch.arange(12), 2, 6).view(2, 6, 32)
    torch.testing.assert_close(ours, layer(x, src_mask=mask, is_causal=True), rtol=1e-4, atol=1e-5)


def test_packed_captions_give_every_gradient_of_padded_ones():
    """Against each caption encoded by itself, which needs neither padding nor packing."""
    tower, rows = TextTower(CNN, 50, END).double(), ids(4, 9, 3, 7)
    lengths = ((rows == END).int().argmax(1) + 1).tolist()
    alone = torch.cat([tower(row[None, :n]) for row, n in zip(rows, lengths, strict=True)])
    weights = torch.randn_like(alone)
    expected = torch.autograd.grad((alone * weights).sum(), list(tower.parameters()))
    together = torch.autograd.grad((tower(rows) * weights).sum(), list(tower.parameters()))
    for a, b in zip(together, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("config", [CNN, VIT], ids=["cnn", "vit"])
def test_checkpointing_changes_no_gradient(config):
    images, texts = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8), ids(4, 6, 5)

    def gradients(checkpointed):
        torch.manual_seed(0)
        model = CLIP(dataclasses.replace(config, grad_checkpointing=checkpointed), 50, END)
        (model.encode_image(images) * model.encode_text(texts)).sum().backward()
        return [p.grad for n, p in model.named_parameters() if n != "log_logit_scale"]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b)


def test_a_tower_without_checkpointing_is_refused():
    with pytest.raises(RecipeError, match="no gradient checkpointing"):
        ImageTower(CLIPConfig("clipkit_resnet", 32, grad_checkpointing=True))


def test_logit_scale_starts_at_clips_value_and_is_clamped():
    model = CLIP(CNN, 50, END)
    assert model.logit_scale.item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.log_logit_scale.fill_(9.0)
    model.clamp_logit_scale()
    assert model.logit_scale.item() == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("tower", "arguments", "message"),
    [
        ("resnet1B", {}, r"timm has no model 'resnet1B'; did you mean"),
        ("convnext_atto", {"colour": 3}, r"cannot build image tower 'convnext_atto' with \{'colour': 3\}"),
        ("convnext_atto", {"dims": [8]}, r"cannot build image tower"),
    ],
)
def test_wrong_towers_are_one_line(tower, arguments, message):
    with pytest.raises(RecipeError, match=message) as error:
        CLIP(CLIPConfig(tower, 32, arguments, **TINY), 50, END)
    assert "\n" not in str(error.value)


def test_training_may_see_smaller_pictures_where_the_tower_takes_them():
    cnn = CLIP(CLIPConfig("clipkit_resnet", 32, {"channels": [8], "depths": [1]}, **TINY), 50, END)
    assert cnn.encode_image(torch.zeros(1, 3, 24, 24)).shape == cnn.encode_image(torch.zeros(1, 3, 32, 32)).shape
    cnn.image.check_size(24)
    with pytest.raises(RecipeError, match="does not take 24x24 pixels"):
        CLIP(VIT, 50, END).image.check_size(24)
    dynamic = dataclasses.replace(VIT, image_kwargs={**VIT.image_kwargs, "dynamic_img_size": True})
    CLIP(dynamic, 50, END).image.check_size(24)


# One tower of each family, as small as its constructor lets it be.
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {"depth": 1, "patch_drop_rate": 0.5}),
    "deit": ("deit3_small_patch16_224", {"depth": 1, "embed_dim": 64, "num_heads": 2}),
    "eva": ("eva02_tiny_patch14_224", {"depth": 1, "patch_size": 16}),
    "beit": ("beit_base_patch16_224", {"depth": 1, "embed_dim": 64, "num_heads": 2}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 24, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2},
    ),
    "xcit": ("xcit_nano_12_p16_224", {"depth": 1}),
    "convnext": ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}),
    "resnet": ("resnet18", {"channels": [8, 8, 16, 16]}),
    "resnetv2": ("resnetv2_50", {"layers": [1, 1, 1, 1], "channels": [32, 32, 64, 64], "stem_chs": 16}),
    "efficientnet": ("tinynet_e", {}),
    "mobilenet": ("mobilenetv3_small_050", {}),
    "regnet": ("regnetx_002", {}),
    "ghostnet": ("ghostnet_050", {}),
    "mobilevit": ("mobilevit_xxs", {}),
    "densenet": ("densenet121", {"block_config": [1, 1, 1, 1], "growth_rate": 8}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_timms_families_are_image_towers(family):
    tower = ImageTower(CLIPConfig(FAMILIES[family][0], 64, FAMILIES[family][1], **TINY))
    features = tower(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    assert features.shape == (2, 16)
    features.sum().backward()
    assert [n for n, p in tower.named_parameters() if p.grad is None] == []
