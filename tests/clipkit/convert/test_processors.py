"""Pictures and captions as the files beside the weights ask for them: equal to the libraries that wrote these."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipkit.convert import processors
from clipkit.data.images import preprocessing
from clipkit.errors import CheckpointError
from clipkit.models.clip import CLIPConfig, Conventions
from clipkit.models.tokenizer import siglip

SQUARE = {"size": {"shortest_edge": 48}, "crop_size": 48}
SIZES = [(48, 48), (96, 48), (51, 120), (20, 37), (300, 4)]


def picture(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def seen(how, image):
    """What the model sees: prepared and normalised."""
    config = CLIPConfig(image_size=48, conventions=Conventions(**how))
    mean, std = (torch.tensor(how[f"image_{key}"]).view(3, 1, 1) for key in ("mean", "std"))
    return (preprocessing(config)(image).float() / 255 - mean) / std


def same_pictures(how, image, wanted):
    """To the bit; where the margin that is cropped off is not computed, to one of 255 levels."""
    levels = (seen(how, image) - wanted).abs() * torch.tensor(how["image_std"]).view(3, 1, 1) * 255
    assert levels.max() < (1.01 if how["image_resize"] == "crop" else 1e-3)
    assert (levels > 0.5).float().mean() < 0.05


@pytest.mark.parametrize(
    "given",
    [
        {"resize_mode": "longest", "fill_color": 77, "interpolation": "bilinear", "mean": 0.5, "std": [0.5, 0.25, 1]},
        {"resize_mode": "longest", "interpolation": "random"},
        {"resize_mode": "squash", "mean": None, "interpolation": None},
        {"resize_mode": "shortest", "size": 224, "mode": "RGB"},
        {},
    ],
)
def test_pictures_are_prepared_as_by_open_clip(given):
    transform = pytest.importorskip("open_clip.transform")
    theirs = transform.PreprocessCfg(**transform.merge_preprocess_dict(transform.PreprocessCfg(), given | {"size": 48}))
    apply = transform.image_transform_v2(theirs, is_train=False)
    for size in SIZES:
        same_pictures(processors.open_clip_pictures(given), picture(*size), apply(picture(*size)))


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("CLIP", {"size": 48, "crop_size": 48}),
        ("CLIP", {"size": {"shortest_edge": 48}, "crop_size": {"height": 48, "width": 48}, "resample": 2}),
        ("CLIP", {"size": {"height": 48, "width": 48}, "do_center_crop": False, "image_mean": [0.1, 0.2, 0.3]}),
        ("CLIP", {"size": {"height": 48, "width": 48}, "crop_size": 48, "do_normalize": False}),
        ("Siglip", {"size": {"height": 48, "width": 48}, "resample": 2, "image_std": [0.3, 0.4, 0.5]}),
        ("Siglip", {"size": {"height": 48, "width": 48}, "do_convert_rgb": None, "do_pad": False}),
    ],
)
def test_pictures_are_prepared_as_by_transformers(kind, given):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, f"{kind}ImageProcessorPil", None) or getattr(transformers, f"{kind}ImageProcessor")
    apply, how = theirs(**given), processors.transformers_pictures(given, kind.lower(), 48)
    for size in [(48, 48), (96, 48), (52, 120)]:  # with whole margins: theirs rounds the crop's place down
        wanted = torch.as_tensor(apply(picture(*size), return_tensors="pt")["pixel_values"][0])
        same_pictures(how, picture(*size), wanted)


def test_without_settings_pictures_are_prepared_as_by_the_models_own_processor():
    clip, other = (processors.transformers_pictures(None, kind, 48) for kind in ("clip", "siglip"))
    assert (clip["image_resize"], clip["image_mean"]) == ("crop", Conventions.image_mean)
    assert (other["image_resize"], other["image_std"]) == ("squash", (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"resize_mode": "tile"}, "preprocess_cfg.resize_mode 'tile' is not supported; known: shortest, squash, long"),
        ({"interpolation": "nearest"}, "preprocess_cfg.interpolation 'nearest' is not supported"),
        ({"mean": [0.5]}, r"preprocess_cfg.mean is \[0.5\]; it must be a number for each of three channels"),
        ({"std": [0.5, 0, 0.5]}, "preprocess_cfg.std is .* it must be above 0"),
        ({"std": float("nan")}, "preprocess_cfg.std is nan; it must be a number"),
        ({"fill_color": 256}, "preprocess_cfg.fill_color is 256; it must be at most 255"),
        ({"fill_color": [1, 2, 3]}, r"preprocess_cfg.fill_color = \[1, 2, 3\] must be of the type of 0"),
        ({"mode": "L"}, "preprocess_cfg.mode = 'L' asks for"),
        ({"crop_pct": 0.9}, "preprocess_cfg.crop_pct = 0.9 is unknown to clipkit"),
        ([], r"preprocess_cfg is \[\]; it must be a JSON object"),
    ],
)
def test_what_open_clip_can_ask_for_and_clipkit_cannot_do(given, message):
    with pytest.raises(CheckpointError, match=message):
        processors.open_clip_pictures(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 64, "crop_size": 48}, "size 64 with crop_size 48 is not supported for a model of 48 pixels"),
        ({"size": 48, "do_center_crop": False}, "size 48 with no crop is not supported"),
        ({"size": {"height": 48, "width": 64}}, "size {'height': 48, 'width': 64} with crop_size"),
        ({"size": {"longest_edge": 48}}, "size {'longest_edge': 48} with"),
        ({"crop_size": 48}, "size {'shortest_edge': 224} with crop_size 48 is not supported for a model of 48"),
        ({"resample": 0, **SQUARE}, "resample 0 is not supported; known: 2, 3"),
        ({"do_resize": False}, "do_resize = False asks for"),
        ({"do_rescale": False}, "do_rescale = False asks for"),
        ({"do_pad": True}, "do_pad = True asks for"),
        ({"rescale_factor": 1.0}, r"rescale_factor 1\.0 is not supported; it must be 1/255"),
        ({"image_processor_type": "ViTImageProcessor"}, "'ViTImageProcessor' is not supported; known: CLIPImage"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order = True is unknown to clipkit"),
        ({"auto_map": {"AutoImageProcessor": "code.Mine"}}, "auto_map = .* is unknown to clipkit"),
        ({"image_mean": "x", **SQUARE}, "image_mean is 'x'; it must be a number"),
    ],
)
def test_what_transformers_can_ask_for_and_clipkit_cannot_do(given, message):
    with pytest.raises(CheckpointError, match=message):
        processors.transformers_pictures(given, "clip", 48)


def test_the_settings_inside_processor_config_count_first(tmp_path):
    """As transformers 5 writes and reads them."""
    assert processors.read_preprocessor(tmp_path) is None
    (tmp_path / "preprocessor_config.json").write_text('{"size": 1}')
    assert processors.read_preprocessor(tmp_path) == {"size": 1}
    (tmp_path / "processor_config.json").write_text('{"processor_class": "CLIPProcessor"}')
    assert processors.read_preprocessor(tmp_path) == {"size": 1}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"size": 2}}))
    assert processors.read_preprocessor(tmp_path) == {"size": 2}


@pytest.fixture(scope="module")
def canonicalize():
    """transformers' cleaning for SigLIP; its module wants sentencepiece, its method does not."""
    pytest.importorskip("transformers")
    stands_in = "sentencepiece" not in sys.modules
    if stands_in:
        sys.modules["sentencepiece"] = types.ModuleType("sentencepiece")
    try:
        module = pytest.importorskip("transformers.models.siglip.tokenization_siglip")
    finally:
        if stands_in:
            del sys.modules["sentencepiece"]
    this = types.SimpleNamespace(do_lower_case=True)
    this.remove_punctuation = lambda text: module.SiglipTokenizer.remove_punctuation(this, text)
    return lambda text: module.SiglipTokenizer.canonicalize_text(this, text)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
@settings(max_examples=200)
def test_captions_are_cleaned_as_by_transformers_siglip(canonicalize, text):
    assert siglip(text) == canonicalize(text)


@pytest.mark.parametrize("text", ["A cat_s  Photo, of: 'it'!", "a\u00a0b\n\tc", "ΑΣ İ ß", "&amp; x", "", "_"])
def test_captions_are_cleaned_as_by_transformers_siglip_where_others_differ(canonicalize, text):
    assert siglip(text) == canonicalize(text)
