"""What is exported, the library that it is for reads with equal features."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from foreign import CONFIGS, TEXT, shaken, theirs, written

import clipkit
from clipkit import export
from clipkit.cli import cli
from clipkit.errors import CheckpointError, UsageError
from clipkit.images import preprocessing
from clipkit.model import CLIP, CLIPConfig, Conventions
from clipkit.pretrained import Pretrained

open_clip = pytest.importorskip("open_clip")

CAPTIONS = ["a photo of a cat", "a RED  car &amp; a dog", "x", "one two three " * 12]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def own(**varied):
    """A model with a tokenizer of its own."""
    tokenizer = clipkit.Tokenizer.train(CAPTIONS * 3, 300, 32)
    shape = {"image_tower": "convnext_atto", "image_size": 64, "embed_dim": 24, "text_width": 32, "text_heads": 2}
    config = CLIPConfig(**{**shape, "context_length": 32, **varied})
    model = shaken(CLIP(config, tokenizer.vocab_size, tokenizer.end_id))
    return Pretrained(model, tokenizer, preprocessing(config))


def pictures(clip):
    size = clip.model.config.image_size
    coarse = torch.randint(0, 2, (3, 3, 2, 2), generator=torch.Generator().manual_seed(1)) * 255.0
    return F.interpolate(coarse, size=(size, size)).to(torch.uint8)


@torch.no_grad()
def features(clip):
    return clip.model.encode_image(pictures(clip)), clip.model.encode_text(clip.tokenizer(CAPTIONS))


def same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.as_tensor(a), b, rtol=0, atol=1e-5)


@torch.no_grad()
def read_by_open_clip(folder, clip):
    pixels = clip.model.image.normalise(pictures(clip))
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(CAPTIONS)
    return model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)


@pytest.mark.parametrize(
    "varied",
    [{}, {"image_tower": "resnet18"}, {"conventions": Conventions(image_projection="mlp", text_activation="gelu_tanh")},
     {"conventions": Conventions(text_activation="quick_gelu", text_mlp_width=70, text_projection_bias=True)}],
)  # fmt: skip
def test_open_clip_reads_a_model_of_ours(varied, tmp_path):
    pytest.importorskip("transformers")
    clip = own(**varied)
    export.export(clip, tmp_path / "out", "open_clip")
    wanted = features(clip)
    same(read_by_open_clip(tmp_path / "out", clip), wanted)
    again = clipkit.load(tmp_path / "out", "cpu")
    same(features(again), wanted)
    assert again.tokenizer(CAPTIONS).equal(clip.tokenizer(CAPTIONS))


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16 quick", "convnext mlp"])
def test_open_clip_reads_its_own_model_again(name, tmp_path):
    config = {**CONFIGS[name], "text_cfg": TEXT}
    clip = clipkit.load(written(tmp_path / "in", config, theirs(config)), "cpu")
    files = export.export(clip, tmp_path / "out", "open_clip")
    assert [f.name for f in files] == ["open_clip_config.json", "open_clip_model.safetensors"]  # CLIP's own vocabulary
    same(read_by_open_clip(tmp_path / "out", clip), features(clip))


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
@torch.no_grad()
def test_transformers_reads_it(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    if kind == "CLIP":
        config = {**CONFIGS["ViT-B-16 quick"], "text_cfg": TEXT}
        clip = clipkit.load(written(tmp_path / "in", config, theirs(config)), "cpu")
    else:
        how = Conventions(
            text_attention="full", text_pool="last", text_projection_bias=True, image_projection="none", pad_id=1,
            text_norm_eps=1e-6, text_activation="gelu_tanh", image_mean=(0.5,) * 3, image_std=(0.5,) * 3,
        )  # fmt: skip
        tower = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16, "act_layer": "gelu_tanh"}
        clip = own(
            image_tower="vit_base_patch16_siglip_224", image_kwargs=tower, embed_dim=32, init_logit_bias=-10.0,
            conventions=how,
        )  # fmt: skip
    export.export(clip, tmp_path / "out", "transformers")
    model = getattr(transformers, f"{kind}Model").from_pretrained(tmp_path / "out").eval()
    ids = clip.tokenizer(CAPTIONS)
    length = clip.model.config.context_length
    ids = F.pad(ids, (0, length - ids.shape[1]), value=clip.model.config.conventions.pad_id)
    pixels = clip.model.image.normalise(pictures(clip))
    found = [model.get_image_features(pixels), model.get_text_features(ids)]
    found = [F.normalize(f if isinstance(f, torch.Tensor) else f.pooler_output, dim=-1) for f in found]
    same(found, features(clip))
    if kind == "CLIP":
        same(features(clipkit.load(tmp_path / "out", "cpu")), found)


def padded(clip):
    ids = clip.tokenizer(CAPTIONS)
    return F.pad(ids, (0, clip.model.config.context_length - ids.shape[1]))


def test_programs_of_torch_export(tmp_path):
    clip = own()
    export.export(clip, tmp_path, "torch")
    wanted = features(clip)
    image, text = (torch.export.load(tmp_path / f"{name}.pt2").module() for name in ("image", "text"))
    with torch.no_grad():
        same([image(pictures(clip)), text(padded(clip))], wanted)


def test_onnx_graphs(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    clip = own()
    export.export(clip, tmp_path, "onnx")
    wanted = features(clip)
    inputs = {"image": {"pixels": pictures(clip).numpy()}, "text": {"ids": padded(clip).numpy()}}
    found = [
        runtime.InferenceSession(str(tmp_path / f"{name}.onnx")).run(None, values)[0] for name, values in inputs.items()
    ]
    same([torch.from_numpy(np.array(f)) for f in found], wanted)
    about = json.loads((tmp_path / "clipkit.json").read_text())
    assert about["logit_scale"] == pytest.approx(float(clip.model.logit_scale.detach()), rel=1e-6)


@pytest.mark.parametrize(
    ("varied", "form", "message"),
    [
        ({"image_tower": "clipkit_resnet"}, "open_clip", "open_clip has no image tower clipkit_resnet"),
        ({"image_kwargs": {"drop_path_rate": 0.1}}, "open_clip", r"cannot be told image_kwargs\.drop_path_rate"),
        (
            {"image_tower": "vit_tiny_patch16_224"},
            "open_clip",
            "for its usual image size; at 64 pixels pos_embed",
        ),
        ({}, "transformers", "transformers has CLIP with OpenAI's ViT, and SigLIP; not with convnext_atto"),
        ({}, "gguf", "unknown format 'gguf'; known: open_clip, transformers, onnx, torch"),
    ],
)
def test_what_the_others_do_not_have(varied, form, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        export.export(own(**varied), tmp_path, form)


def test_the_command_and_the_card(chain, tmp_path, monkeypatch, capsys):
    words = ["export", "--model", str(chain), str(tmp_path / "out"), "--format", "torch"]
    cli.main(words, standalone_mode=False)
    assert capsys.readouterr().out.splitlines()[0] == str(tmp_path / "out" / "image.pt2")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="cannot push to me/mine"):
        cli.main([*words, "--push", "me/mine"], standalone_mode=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# me/mine" in card
    config = clipkit.load(chain, "cpu").model.config
    assert f"| image tower | {config.image_tower}, {config.image_size} x {config.image_size} pixels |" in card


def test_pushing_asks_the_hub_for_what_it_offers(tmp_path, monkeypatch):
    """The calls fit the signatures of the hub's library; what they do there needs a network."""
    import inspect

    from huggingface_hub import HfApi

    from clipkit import hub

    asked = {}

    class Api:
        def __getattr__(self, name):
            def call(*arguments, **named):
                asked[name] = inspect.signature(getattr(HfApi, name)).bind(self, *arguments, **named).arguments
                return "https://hub/me/mine"

            return call

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert hub.push(own().model, tmp_path, "me/mine") == "https://hub/me/mine"
    assert (asked["create_repo"]["repo_id"], asked["create_repo"]["exist_ok"]) == ("me/mine", True)
    assert (asked["upload_folder"]["repo_id"], asked["upload_folder"]["folder_path"]) == ("me/mine", tmp_path)
    assert (tmp_path / "README.md").is_file()
