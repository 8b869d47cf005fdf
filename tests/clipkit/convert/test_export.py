"""What is exported, the library that it is for reads with equal features."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from external_models import CONFIGS, TEXT, shaken, theirs, written
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import clipkit
from clipkit.cli import cli
from clipkit.convert import export
from clipkit.data.images import preprocessing
from clipkit.errors import CheckpointError, UsageError
from clipkit.models.clip import CLIP, CLIPConfig, Conventions
from clipkit.models.pretrained import Pretrained

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


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16 quick", "RN50", "convnext mlp"])
def test_open_clip_reads_its_own_model_again(name, tmp_path):
    config = {**CONFIGS[name], "text_cfg": TEXT}
    clip = clipkit.load(written(tmp_path / "in", config, theirs(config)), "cpu")
    export.export(clip, tmp_path / "out", "open_clip")
    config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert "hf_tokenizer_name" not in config["model_cfg"]["text_cfg"]  # CLIP's own vocabulary, which open_clip has
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


def hostile():
    """Captions that cleaning, special tokens and rare characters could break."""
    pieces = [
        "it's",
        "DON’T",
        "“quoted”",
        "<|endoftext|>",
        "<|startoftext|> x",
        "naïve",
        "e\u0301",
        "北京",
        "🙂",
        "½",
        "_",
    ]
    return [*CAPTIONS[2:], *pieces, " ".join(pieces), "", " ", "\t a\u00a0b\n", "!", "a!", "0123", "ÀÉ", "ﬁ", "\u200b"]


def mended(text):
    """Whether ftfy or HTML's entities change more of it than single characters, which no tokenizer.json can say."""
    import unicodedata

    from clipkit.models.tokenizer import clean

    plain = unicodedata.normalize("NFC", text).translate(str.maketrans("‘’‚‛ʼ“”„‟", "'" * 5 + '"' * 4))
    return clean(text) != " ".join("".join(map(str.lower, plain)).split())


@pytest.fixture(scope="module")
def clips_vocabulary(tmp_path_factory):
    """A model with CLIP's own vocabulary, and what transformers' AutoTokenizer reads of its export."""
    transformers = pytest.importorskip("transformers")
    folder, config = tmp_path_factory.mktemp("clip"), {**CONFIGS["ViT-B-16 quick"], "text_cfg": TEXT}
    clip = clipkit.load(written(folder / "in", config, theirs(config)), "cpu")
    export.export(clip, folder / "out", "transformers")
    return clip, transformers.AutoTokenizer.from_pretrained(folder / "out"), folder / "out"


@pytest.fixture(scope="module")
def own_vocabulary(tmp_path_factory):
    """The same with a tokenizer that was trained here."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("own")
    tower = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 16}
    clip = own(image_tower="vit_base_patch16_clip_224", image_kwargs=tower, image_size=32)
    export.export(clip, folder / "out", "transformers")
    return clip, transformers.AutoTokenizer.from_pretrained(folder / "out"), folder / "out"


def same_ids(clip, tokenizer, text):
    found = tokenizer(text, truncation=True)["input_ids"]
    assert found == clip.tokenizer(text)[0].tolist(), text


@pytest.mark.parametrize("vocabulary", ["clips_vocabulary", "own_vocabulary"])
def test_transformers_cuts_hostile_captions_alike(vocabulary, request):
    clip, tokenizer, _ = request.getfixturevalue(vocabulary)
    for text in hostile():
        if not mended(text):
            same_ids(clip, tokenizer, text)
    assert sum(map(mended, hostile())) <= 3


@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=40))
@settings(max_examples=200, suppress_health_check=[HealthCheck.filter_too_much])
def test_transformers_cuts_any_caption_alike(clips_vocabulary, text):
    assume(not mended(text))
    same_ids(*clips_vocabulary[:2], text)


@pytest.mark.parametrize("vocabulary", ["clips_vocabulary", "own_vocabulary"])
@torch.no_grad()
def test_transformers_gives_equal_features_of_captions_and_pictures(vocabulary, request):
    """Through its processor alone: tokenizer, preprocessing and weights are those of the export."""
    from transformers import AutoModel, AutoProcessor

    clip, _, folder = request.getfixturevalue(vocabulary)
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    images = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pictures(clip)]
    texts = [text for text in CAPTIONS if not mended(text)]
    ready = processor(text=texts, images=images, padding=True, truncation=True, return_tensors="pt")
    found = model(**ready)
    same([found.image_embeds], [features(clip)[0]])
    same([found.text_embeds], [clip.model.encode_text(clip.tokenizer(texts))])


@pytest.mark.parametrize(
    ("cleaning", "text", "same_as"),
    [
        ("canonical", "A cat_s, it’s", "a cat s its"),
        ("siglip", "A cat_s, its", "a cats its"),
        ("whitespace", " A   cat ", "A cat"),
        ("lower", "A  Cat!", "a  cat!"),
        ("none", "A  cat", "A  cat"),
    ],
)
def test_a_foreign_tokenizer_is_exported_with_the_cleaning_that_it_needs(cleaning, text, same_as, tmp_path):
    """Without clipkit nobody would do it: SigLIP's captions went to transformers with their punctuation."""
    from tokenizers import Tokenizer, models, processors

    from clipkit.convert.tokenizer_files import write_tokenizer
    from clipkit.models.tokenizer import ExternalTokenizer

    vocabulary = {t: i for i, t in enumerate(["<pad>", "<eos>", "<unk>", *map(chr, range(32, 127))])}
    encoder = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    encoder.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    write_tokenizer(ExternalTokenizer(encoder, 16, cleaning, 0), Conventions(text_cleaning=cleaning), tmp_path)
    read = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert read.encode(text).ids == encoder.encode(same_as).ids
    assert ExternalTokenizer(encoder, 99, cleaning)(text)[0].tolist() == read.encode(text).ids


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_transformers_prepares_pictures_as_the_model_wants(resize, tmp_path):
    from clipkit.convert.processors import read_preprocessor, transformers_pictures

    pytest.importorskip("transformers")
    tower = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 16}
    how = Conventions(image_resize=resize, image_interpolation="bilinear", image_std=(0.1, 0.2, 0.3))
    clip = own(image_tower="vit_base_patch16_clip_224", image_kwargs=tower, image_size=32, conventions=how)
    export.export(clip, tmp_path / "out", "transformers")
    again = transformers_pictures(read_preprocessor(tmp_path / "out"), "clip", 32)
    assert again == {key: getattr(how, key) for key in again}


def test_open_clip_pads_pictures_as_the_model_wants(tmp_path):
    clip = own(conventions=Conventions(image_resize="pad", image_fill=9))
    export.export(clip, tmp_path / "out", "open_clip")
    _, prepare = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path / 'out'}")
    image = Image.new("RGB", (90, 40), "red")
    assert torch.allclose(prepare(image), clip.model.image.normalise(clip.preprocess(image)[None])[0], atol=1e-6)
    assert clipkit.load(tmp_path / "out", "cpu").model.config.conventions.image_fill == 9
    with pytest.raises(UsageError, match="pads pictures to a square; transformers' processors"):
        export.export(own(image_tower="vit_base_patch16_clip_224", conventions=Conventions(image_resize="pad"),
                          image_kwargs={"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 16}),
                      tmp_path / "x", "transformers")  # fmt: skip


def test_a_published_folder_names_its_own_tokenizer(tmp_path):
    export.export(own(), tmp_path / "out", "open_clip", "me/mine")
    config = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())
    assert config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == "me/mine"


def padded(clip):
    ids = clip.tokenizer(CAPTIONS)
    return F.pad(ids, (0, clip.model.config.context_length - ids.shape[1]))


TOWERS = {
    "convnext": {},
    "clipkit_resnet": {"image_tower": "clipkit_resnet", "image_size": 32},
    "clipkit_resnet9": {"image_tower": "clipkit_resnet9", "image_size": 24},
}


def exported(name):
    return clipkit.load("clipkit-tiny", "cpu") if name == "clipkit-tiny" else own(**TOWERS[name])


@pytest.mark.parametrize("name", ["clipkit-tiny", *TOWERS])
def test_programs_of_torch_export(name, tmp_path):
    clip = exported(name)
    export.export(clip, tmp_path / "out", "torch")
    wanted = features(clip)
    image, text = (torch.export.load(tmp_path / "out" / f"{name}.pt2").module() for name in ("image", "text"))
    with torch.no_grad():
        same([image(pictures(clip)), text(padded(clip))], wanted)


@pytest.mark.parametrize("name", ["clipkit-tiny", *TOWERS])
def test_onnx_graphs(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    clip = exported(name)
    export.export(clip, tmp_path / "out", "onnx")
    inputs = {"image": {"pixels": pictures(clip).numpy()}, "text": {"ids": padded(clip).numpy()}}
    found = [
        runtime.InferenceSession(str(tmp_path / "out" / f"{name}.onnx")).run(None, values)[0]
        for name, values in inputs.items()
    ]
    for a, b in zip(found, features(clip), strict=True):
        torch.testing.assert_close(torch.from_numpy(np.array(a)), b, rtol=0, atol=1e-4)
    about = json.loads((tmp_path / "out" / "clipkit.json").read_text())
    assert about["logit_scale"] == pytest.approx(float(clip.model.logit_scale.detach()), rel=1e-6)


def test_the_tokenizer_beside_the_graphs_makes_the_ids_that_they_take(tmp_path):
    from tokenizers import Tokenizer

    from clipkit.convert.tokenizer_files import write_tokenizer

    clip = own()
    write_tokenizer(clip.tokenizer, clip.model.config.conventions, tmp_path)
    read = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("A red   CAR", "x"):
        assert read.encode(text).ids == clip.tokenizer(text)[0].tolist()


# Where it goes.


@pytest.mark.parametrize("form", ["open_clip", "transformers"])
def test_own_towers_are_offered_a_way_out(form, tmp_path):
    with pytest.raises(UsageError, match=r"; the formats onnx and torch take every model$"):
        export.export(own(**TOWERS["clipkit_resnet9"]), tmp_path / "a" / "out", form)
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_not_mixed_into_something_else(tmp_path):
    clip, out = own(), tmp_path / "out"
    export.export(clip, out, "open_clip")
    export.export(clip, out, "open_clip")  # the same again
    names = {path.name for path in out.iterdir()}
    with pytest.raises(UsageError, match=r"out is not empty: it holds open_clip_config\.json and 4 more; give a new"):
        export.export(clip, out, "torch")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"is not empty: it holds notes\.txt and 5 more; give a new folder"):
        export.export(clip, out, "open_clip")
    assert {path.name for path in out.iterdir()} == {*names, "notes.txt"}
    (tmp_path / "theirs").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "theirs" / "open_clip_model.safetensors")  # somebody else's
    with pytest.raises(UsageError, match="theirs is not empty"):
        export.export(clip, tmp_path / "theirs", "open_clip")


def test_places_that_cannot_be_written_are_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr("clipkit.models.pretrained.load", lambda *_: pytest.fail("the model was loaded first"))
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / ("n" * 300)):
        with pytest.raises(UsageError, match=r"cannot write into .*(Not a directory|too long)"):
            cli.main(["export", str(out)], standalone_mode=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_save", fails)
    (tmp_path / "there").mkdir()
    for out in (tmp_path / "new" / "out", tmp_path / "there"):
        with pytest.raises(OSError, match="No space left"):
            export.export(own(), out, "open_clip")
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize(
    ("varied", "form", "message"),
    [
        ({"image_tower": "clipkit_resnet"}, "open_clip", "open_clip has no image tower clipkit_resnet"),
        ({"image_kwargs": {"drop_path_rate": 0.1}}, "open_clip", r"does not take image_kwargs\.drop_path_rate"),
        (
            {"image_tower": "vit_tiny_patch16_224"},
            "open_clip",
            "for its usual image size; at 64 pixels pos_embed",
        ),
        ({}, "transformers", "transformers has CLIP with OpenAI's ViT, and SigLIP; not with convnext_atto"),
        ({}, "gguf", "unknown export format 'gguf'; known: open_clip, transformers, onnx, torch"),
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
    assert f"| image encoder | {config.image_tower}, {config.image_size} x {config.image_size} pixels |" in card


def test_pushing_asks_the_hub_for_what_it_offers(tmp_path, monkeypatch):
    """The calls fit the signatures of the hub's library; what they do there needs a network."""
    import inspect

    from huggingface_hub import HfApi

    from clipkit.convert import hub

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
