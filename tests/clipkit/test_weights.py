"""Everyone's weights: features equal to those of the library that wrote them."""

import json
import pickle
import warnings

import pytest
import torch
from foreign import CONFIGS, TEXT, shaken, theirs, written
from safetensors.torch import save_file
from torch import nn

import clipkit
from clipkit import archives, weights
from clipkit.errors import CheckpointError
from clipkit.model import CLIP

open_clip = pytest.importorskip("open_clip")

CAPTIONS = ["a photo of a cat", "A red  car &amp; a dog!", "x", "naïve café " * 40]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pictures(clip):
    size = clip.model.config.image_size
    coarse = torch.randint(0, 2, (2, 3, 2, 2)) * 255.0
    return nn.functional.interpolate(coarse, size=(size, size)).to(torch.uint8)


@torch.no_grad()
def same_features(clip, image_features, text_features, ids):
    pixels = pictures(clip)
    ours = clip.model.encode_image(pixels)
    wanted = nn.functional.normalize(image_features(clip.model.image.normalise(pixels)), dim=-1)
    assert torch.allclose(ours, wanted, atol=1e-5)
    assert (ours[0] - ours[1]).abs().max() > 3e-4  # and do depend on the image
    wanted = nn.functional.normalize(text_features(ids), dim=-1)
    assert torch.allclose(clip.model.encode_text(clip.tokenizer(CAPTIONS)), wanted, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_open_clips_models(name, tmp_path):
    config = {**CONFIGS[name], "text_cfg": {**TEXT, **CONFIGS[name].get("text_cfg", {})}}
    model = theirs(config)
    clip = clipkit.load(written(tmp_path, config, model))
    same_features(clip, model.encode_image, model.encode_text, open_clip.tokenize(CAPTIONS))
    assert torch.allclose(clip.model.logit_scale, model.logit_scale.exp())


def test_open_clips_siglip(tmp_path):
    config = json.loads(json.dumps(open_clip.get_model_config("ViT-B-16-SigLIP")))
    config["text_cfg"] |= {"layers": 2, "width": 768, "vocab_size": 400}
    config.pop("custom_text")
    config["text_cfg"]["pad_id"] = 1
    model = theirs({**config, "custom_text": True})
    folder = written(tmp_path, config, model, mean=[0.5] * 3, std=[0.5] * 3, resize_mode="squash")
    sentencepiece(folder)
    clip = clipkit.load(folder)
    tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), context_length=64, clean="canonicalize")
    same_features(clip, model.encode_image, model.encode_text, tokenizer(CAPTIONS))
    assert torch.allclose(clip.model.logit_bias, model.logit_bias)
    assert clip.preprocess.keywords["resize"] == "squash"
    assert clip.model.image.mean.flatten().tolist() == [0.5] * 3


def sentencepiece(folder):
    """A small tokenizer.json like SigLIP's: Unigram, lower case, </s> at the end and as padding."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    encoder = Tokenizer(models.Unigram())
    encoder.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    encoder.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    encoder.train_from_iterator([*CAPTIONS, "abcdefghijklmnopqrstuvwxyz the quick brown fox"] * 3, trainer)
    encoder.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    encoder.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "model_max_length": 64}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))


def openai_state(quick=True):
    config = {**CONFIGS["ViT-B-32"], "text_cfg": TEXT, "quick_gelu": quick}
    model = theirs(config)
    sizes = {
        "input_resolution": torch.tensor(64),
        "context_length": torch.tensor(77),
        "vocab_size": torch.tensor(49408),
    }
    return model, {**model.state_dict(), **sizes}


def tree(state):
    """A module with these tensors, as OpenAI's archives hold them."""
    root = nn.Module()
    for name, tensor in state.items():
        module = root
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, nn.Module())
            module = getattr(module, part)
        module.register_buffer(leaf, tensor)
    return root


@pytest.mark.parametrize("scripted", [False, True])
def test_openais_files(tmp_path, scripted):
    model, state = openai_state()
    path = tmp_path / "ViT-B-32.pt"
    if scripted:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.script(tree(state)).save(str(path))
    else:
        torch.save(state, path)
    clip = clipkit.load(path)
    assert clip.model.config.conventions.text_activation == "quick_gelu"
    same_features(clip, model.encode_image, model.encode_text, open_clip.tokenize(CAPTIONS))


def test_openais_resnet(tmp_path):
    config = {**CONFIGS["RN50"], "text_cfg": TEXT, "quick_gelu": True}
    model = theirs(config)
    sizes = {
        "input_resolution": torch.tensor(64),
        "context_length": torch.tensor(77),
        "vocab_size": torch.tensor(49408),
    }
    torch.save({k: v.half() for k, v in {**model.state_dict(), **sizes}.items()}, tmp_path / "RN50.pt")
    clip = clipkit.load(tmp_path / "RN50.pt")
    model.half().float()  # the same rounding
    same_features(clip, model.encode_image, model.encode_text, open_clip.tokenize(CAPTIONS))


def hugging_face(kind, folder, **text):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 200}
    config = getattr(transformers, f"{kind}Config")(
        text_config={**shape, **text},
        vision_config={**shape, "image_size": 48, "patch_size": 16, "intermediate_size": 256},
        projection_dim=32,
    )
    model = shaken(getattr(transformers, f"{kind}Model")(config))
    model.save_pretrained(folder)
    return model


def pooled(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def test_transformers_clip(tmp_path):
    model = hugging_face("CLIP", tmp_path, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407)
    clip = clipkit.load(tmp_path)
    ids = open_clip.tokenize(CAPTIONS)
    same_features(
        clip, lambda x: pooled(model.get_image_features(x)), lambda x: pooled(model.get_text_features(x)), ids
    )


def test_transformers_siglip(tmp_path):
    model = hugging_face("Siglip", tmp_path, vocab_size=400, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    sentencepiece(tmp_path)
    clip = clipkit.load(tmp_path)
    tokenizer = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=64, clean="canonicalize")
    ids = tokenizer(CAPTIONS)
    same_features(
        clip, lambda x: pooled(model.get_image_features(x)), lambda x: pooled(model.get_text_features(x)), ids
    )


def test_a_folder_with_both_configurations(tmp_path):
    """As the hub's repositories of LAION: the weights that are there say which one counts."""
    model = hugging_face("CLIP", tmp_path, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIGS["ViT-B-32"]}))
    clip = clipkit.load(tmp_path)
    ids = open_clip.tokenize(CAPTIONS)
    same_features(
        clip, lambda x: pooled(model.get_image_features(x)), lambda x: pooled(model.get_text_features(x)), ids
    )


def test_the_tokenizer_beside_the_weights_counts(tmp_path):
    config = {**CONFIGS["convnext"], "text_cfg": {**TEXT, "vocab_size": 300}}
    own = clipkit.Tokenizer.train(CAPTIONS * 3, 300)
    folder = written(tmp_path, config, theirs(config))
    (folder / "tokenizer.json").write_text(own.to_json())
    assert clipkit.load(folder).tokenizer("a red car").equal(own("a red car"))


# What is refused.


def broken(tmp_path, **changes):
    config = {**CONFIGS["ViT-B-32"], "text_cfg": TEXT}
    model = theirs(config)
    for section, change in changes.items():
        config[section] = {**config[section], **change} if isinstance(change, dict) else change
    return written(tmp_path, config, model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"vision_cfg": {"layers": 3}},
            "another architecture than .* says: 12 tensors missing and 0 too many, such as image",
        ),
        ({"vision_cfg": {"width": 64}}, r"another architecture: image\.trunk\.\S+ is .* where .* is due"),
        ({"vision_cfg": {"attentional_pool": True}}, "vision_cfg.attentional_pool = True asks for an architecture"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "text_cfg.hf_model_name = 'roberta-base'"),
        ({"text_cfg": {"pool_type": "first"}}, "pool_type 'first' is not supported"),
        ({"text_cfg": {"act_kwargs": {"approximate": "x"}}}, "act_kwargs .* asks for an activation"),
        ({"vision_cfg": {"norm_kwargs": {"eps": 1e-3}}}, "vision_cfg.norm_kwargs = .* asks for an architecture"),
        ({"vision_cfg": {"timm_model_name": "convnext_atto"}}, r"tensors belong to another architecture: visual\.\S+"),
        ({"vision_cfg": {"layers": [1, 2, 3, 4]}}, r"no ModifiedResNet of OpenAI's has \[1, 2, 3, 4\] blocks"),
    ],
)
def test_weights_of_another_architecture(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        clipkit.load(broken(tmp_path, **changes))


def test_weights_that_do_not_say_their_activation(tmp_path):
    model, _ = openai_state()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"nor whether its GELU is the quick one; put an open_clip_config\.json"):
        clipkit.load(tmp_path / "model.pt")


def test_a_folder_that_contradicts_what_is_known(tmp_path, monkeypatch):
    from clipkit import hub

    folder = broken(tmp_path)
    monkeypatch.setattr(hub, "fetch", lambda published: folder)
    with pytest.raises(CheckpointError, match="the activation is gelu; these weights were trained with quick_gelu"):
        clipkit.load("ViT-B-32/openai")


def test_a_published_name_whose_gelu_is_the_tanh_approximation(tmp_path, monkeypatch):
    """SigLIP 2: not the quick GELU, and not the exact one."""
    from clipkit import hub

    text = {**TEXT, "act_kwargs": {"approximate": "tanh"}}
    config = {**CONFIGS["convnext"], "text_cfg": text}
    assert open_clip.get_model_config("ViT-B-16-SigLIP2")["text_cfg"]["act_kwargs"] == text["act_kwargs"]
    model = theirs(config)
    folder = written(tmp_path, config, model)
    monkeypatch.setattr(hub, "fetch", lambda published: folder)
    clip = clipkit.load("ViT-B-16-SigLIP2/webli")
    same_features(clip, model.encode_image, model.encode_text, open_clip.tokenize(CAPTIONS))


def test_transformers_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="model_type is 'bert'; clip and siglip are supported"):
        clipkit.load(tmp_path)


def test_no_tokenizer_anywhere(tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"has no tokenizer; put CLIP's bpe_simple_vocab_16e6"):
        clipkit.load(broken(tmp_path))


def test_cut_files(tmp_path):
    folder = broken(tmp_path)
    path = folder / "open_clip_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="is damaged or no safetensors file"):
        clipkit.load(folder)
    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.arange(1000.0)}, whole)
    for share in (0.1, 0.5, 0.99):
        (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
        with pytest.raises(CheckpointError, match=r"cut\.pt"):
            archives.read(tmp_path / "cut.pt")


def test_archives_give_what_was_saved(tmp_path):
    base = torch.randn(4, 6)
    state = {
        "view": base[1:, ::2],
        "t": base.T,
        "half": base.half(),
        "int": torch.arange(3),
        "flag": torch.tensor(True),
    }
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "a.pt")
    found = archives.read(tmp_path / "a.pt")
    assert found.tensors.keys() == state.keys()
    assert all(torch.equal(found.tensors[k], v) and found.tensors[k].dtype == v.dtype for k, v in state.items())


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_in_an_archive_is_run(tmp_path):
    mark = tmp_path / "mark"
    torch.save({"w": torch.zeros(2), "x": Payload(mark)}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"it needs \w+\.open to be run, which clipkit does not"):
        archives.read(tmp_path / "bad.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(CheckpointError, match="pickle of an old torch"):
        archives.read(tmp_path / "old.pt")
    assert not mark.exists()


def test_a_model_is_built_from_what_translate_gives():
    _, state = openai_state()
    config, tensors = weights.from_openai(state)
    assert CLIP(config, 49408, 49407).state_dict().keys() == tensors.keys()
