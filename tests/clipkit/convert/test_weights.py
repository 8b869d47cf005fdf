"""Everyone's weights: features equal to those of the library that wrote them."""

import json
import pickle
import warnings

import pytest
import torch
from external_models import CONFIGS, TEXT, shaken, theirs, written
from safetensors.torch import load_file, save_file
from torch import nn

import clipkit
from clipkit.convert import unpickling, weights
from clipkit.errors import CheckpointError
from clipkit.models.clip import CLIP

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


def filled(folder):
    """Ids of transformers' own tokenizer, as SigLIP's processor makes them."""
    transformers = pytest.importorskip("transformers")
    read = transformers.AutoTokenizer.from_pretrained(folder)
    return read(CAPTIONS, padding="max_length", truncation=True, max_length=64, return_tensors="pt").input_ids


def test_transformers_siglip(tmp_path):
    model = hugging_face("Siglip", tmp_path, vocab_size=400, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    sentencepiece(tmp_path)
    clip = clipkit.load(tmp_path)
    same_features(
        clip,
        lambda x: pooled(model.get_image_features(x)),
        lambda x: pooled(model.get_text_features(x)),
        filled(tmp_path),
    )


def gemma(folder, kind, **settings):
    """A small tokenizer like SigLIP 2's: spaces are characters, <eos> at the end, <pad> (0) after it."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers, processors

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocabulary = {t: i for i, t in enumerate([*special, *map(chr, range(33, 127)), "\u2581"])}
    encoder = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True))
    encoder.normalizer = normalizers.Replace(" ", "\u2581")
    encoder.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    encoder.add_special_tokens([AddedToken(t, special=True) for t in special])
    encoder.save(str(folder / "tokenizer.json"))
    names = {f"{token.strip('<>')}_token": token for token in special[:4]}
    about = {"tokenizer_class": kind, "padding_side": "right", "model_max_length": 10**30, **names, **settings}
    about = {key: value for key, value in about.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return encoder


@pytest.mark.parametrize("kind", ["Siglip2Tokenizer", "PreTrainedTokenizerFast", "TokenizersBackend"])
@pytest.mark.parametrize("said", [True, False])
def test_transformers_siglip_2_pads_with_its_tokenizers_token(kind, said, tmp_path):
    """The configuration says nothing of padding, or what transformers writes into every one: 1, 49406 and 49407."""
    model = hugging_face("Siglip", tmp_path, vocab_size=120)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["text_config"]["pad_token_id"] == 1
    if not said:
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
            del config["text_config"][key]
        (tmp_path / "config.json").write_text(json.dumps(config))
    gemma(tmp_path, kind)
    clip = clipkit.load(tmp_path)
    assert clip.model.config.conventions.pad_id == 0
    same_features(
        clip,
        lambda x: pooled(model.get_image_features(x)),
        lambda x: pooled(model.get_text_features(x)),
        filled(tmp_path),
    )


def test_gemmas_tokenizer_beside_siglip_lower_cases(tmp_path):
    """As SigLIP 2 was trained (big_vision) and Siglip2Tokenizer does it; punctuation stays."""
    hugging_face("Siglip", tmp_path, vocab_size=120)
    gemma(tmp_path, "GemmaTokenizerFast")
    tokenizer = clipkit.load(tmp_path).tokenizer
    assert tokenizer("A Cat!").equal(tokenizer("a cat!"))
    assert not tokenizer("a cat!").equal(tokenizer("a cat"))


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ({"pad_token_id": 1, "eos_token_id": 1}, {}, "text_config.pad_token_id is 1, and the tokenizer pads with 0"),
        ({}, {"pad_token": None}, "nothing names the token that pads captions; tokenizer_config.json needs its"),
        ({}, {"pad_token": "<nil>"}, "pads with '<nil>', which is no token of tokenizer.json"),
        ({}, {"padding_side": "left"}, "padding_side 'left' is not supported"),
        ({}, {"model_max_length": 16}, "model_max_length is 16, and captions of this model are filled to 64 tokens"),
        ({}, {"tokenizer_class": "BertTokenizer"}, "tokenizer_class 'BertTokenizer' is not supported; known: "),
        ({}, {"add_eos_token": False}, "says add_eos_token False, and tokenizer.json adds it"),
        ({}, {"add_bos_token": True}, "says add_bos_token True, and tokenizer.json does not add it"),
        ({}, {"auto_map": {"AutoTokenizer": ["code.Mine", None]}}, "auto_map .* is not supported"),
        ({}, {"do_lower_case": False}, "do_lower_case False is not supported"),
        ({"vocab_size": 50}, {}, "has a tokenizer of 100 tokens, and a model of 50"),
    ],
)
def test_tokenizers_that_contradict_the_model_or_ask_for_more(text, settings, message, tmp_path):
    hugging_face("Siglip", tmp_path, **{"vocab_size": 120, **text})
    gemma(tmp_path, "PreTrainedTokenizerFast", **settings)
    with pytest.raises(CheckpointError, match=message):
        clipkit.load(tmp_path)


def test_files_that_name_two_tokens_for_padding(tmp_path):
    hugging_face("Siglip", tmp_path, vocab_size=120)
    gemma(tmp_path, "PreTrainedTokenizerFast")
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<eos>"}}')
    with pytest.raises(CheckpointError, match=r"'<pad>' in tokenizer_config\.json, '<eos>' in special_tokens_map"):
        clipkit.load(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<pad>"}}')
    assert clipkit.load(tmp_path).model.config.conventions.pad_id == 0


def test_open_clips_siglip_pads_with_its_tokenizers_token(tmp_path):
    """The multilingual one pads with </s> (1), which no configuration of open_clip's says."""
    config = json.loads(json.dumps(open_clip.get_model_config("ViT-B-16-SigLIP-i18n-256")))
    config["text_cfg"] |= {"layers": 1, "vocab_size": 400}
    model = theirs({**config, "custom_text": True})
    sentencepiece(written(tmp_path, config, model, mean=[0.5] * 3, std=[0.5] * 3, resize_mode="squash"))
    clip = clipkit.load(tmp_path)
    tokenizer = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=64, clean="canonicalize")
    same_features(clip, model.encode_image, model.encode_text, tokenizer(CAPTIONS))


def test_transformers_clip_with_a_tokenizer_of_another_kind(tmp_path):
    model = hugging_face("CLIP", tmp_path, vocab_size=120, bos_token_id=2, eos_token_id=1, pad_token_id=0)
    gemma(tmp_path, "PreTrainedTokenizerFast", model_max_length=20)
    transformers = pytest.importorskip("transformers")
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = read(CAPTIONS, padding=True, truncation=True, return_tensors="pt").input_ids
    clip = clipkit.load(tmp_path)
    assert clip.tokenizer(CAPTIONS).equal(ids)
    same_features(
        clip, lambda x: pooled(model.get_image_features(x)), lambda x: pooled(model.get_text_features(x)), ids
    )


def test_where_transformers_clip_reads_must_be_where_captions_end(tmp_path):
    hugging_face("CLIP", tmp_path, bos_token_id=49406, eos_token_id=7, pad_token_id=1)
    with pytest.raises(CheckpointError, match="eos_token_id is 7, and the tokenizer ends captions with 49407"):
        clipkit.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2  # of every CLIP before transformers 4.31
    (tmp_path / "config.json").write_text(json.dumps(config))
    clipkit.load(tmp_path)


def test_sections_that_clips_of_2022_have_twice(tmp_path):
    model = hugging_face("CLIP", tmp_path, bos_token_id=49406, eos_token_id=49407, pad_token_id=1)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("text_config", "vision_config"):
        config[f"{name}_dict"] = config[name]
        config[name] = {**config[name], "hidden_act": "gelu", "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    same_features(
        clipkit.load(tmp_path),
        lambda x: pooled(model.get_image_features(x)),
        lambda x: pooled(model.get_text_features(x)),
        open_clip.tokenize(CAPTIONS),
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
    config = {**CONFIGS["convnext"], "text_cfg": {**TEXT, "vocab_size": 600, "pool_type": "eos", "eos_id": 1}}
    own = clipkit.Tokenizer.train(CAPTIONS * 3, 600)
    folder = written(tmp_path, config, theirs(config))
    (folder / "tokenizer.json").write_text(own.to_json())
    assert clipkit.load(folder).tokenizer("a red car").equal(own("a red car"))


# What is refused.


def broken(tmp_path, **changes):
    config = {**CONFIGS["ViT-B-32"], "text_cfg": TEXT}
    model = theirs(config)
    for section, change in changes.items():
        config[section] = {**config.get(section, {}), **change} if isinstance(change, dict) else change
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
        ({"vision_cfg": {"layers": [3, 4, 6, 3], "head_width": 32}}, "head_width 32 is not supported for a ResNet"),
        ({"vision_cfg": {"rotary": False}}, "vision_cfg.rotary = False is unknown to clipkit, and may change what"),
        ({"vision_cfg": {"image_size": [64, 32]}}, r"image_size is \[64, 32\]; clipkit has square images only"),
        ({"vision_cfg": {"patch_size": [32, 16]}}, r"patch_size is \[32, 16\]; clipkit has square images only"),
        ({"vision_cfg": {"width": "128"}}, "vision_cfg.width = '128' must be of the type of 768"),
        ({"vision_cfg": {"head_width": 0}}, "makes no model .ZeroDivisionError"),
        ({"vision_cfg": {"timm_model_name": "resnet18", "timm_proj": "x"}}, "timm_proj 'x' is not supported"),
        (
            {"vision_cfg": {"timm_model_name": "resnet18", "timm_proj": "mlp", "timm_proj_bias": True}},
            "timm_proj 'mlp' with a bias is not supported",
        ),
        ({"vision_cfg": {"timm_model_name": "resnet18", "timm_pool": "abs_attn"}}, "timm_pool 'abs_attn' is not"),
        ({"text_cfg": {"ls_init_value": 0.1}}, "text_cfg.ls_init_value = 0.1 asks for an architecture"),
        ({"text_cfg": {"proj_type": "none"}}, "text_cfg.proj_type = 'none' asks for an architecture"),
        ({"text_cfg": {"norm_kwargs": {"elementwise_affine": False}}}, "norm_kwargs.elementwise_affine = False is"),
        ({"text_cfg": {"norm_kwargs": {"eps": float("nan")}}}, "norm_kwargs.eps = nan must be of the type of 1e-05"),
        ({"text_cfg": {"tokenizer_mode": "clips"}}, "text_cfg.tokenizer_mode = 'clips' asks for"),
        ({"text_cfg": {"tokenizer_kwargs": {"clean": "canonicalize"}}}, "tokenizer_kwargs.clean 'canonicalize' is not"),
        ({"text_cfg": {"tokenizer_kwargs": {"reduction_mask": "syntax"}}}, "reduction_mask = 'syntax' asks for"),
        ({"text_cfg": {"pool_type": "eos"}}, "pool_type 'eos' reads captions at token 2, the tokenizer ends them with"),
        ({"text_cfg": {"hf_tokenizer_name": "x"}}, r"has no tokenizer\.json, which these weights need"),
        ({"text_cfg": None}, "text_cfg = None must be of the type of {}"),
        ({"quick_gelu": True, "text_cfg": {"act_kwargs": {"approximate": "tanh"}}}, "act_kwargs .* asks for an activ"),
        ({"multimodal_cfg": {"width": 64}}, "model_cfg.multimodal_cfg = .* asks for an architecture"),
        ({"embed_dim": 0}, "model_cfg has no embed_dim"),
        ({"init_logit_bias": -10}, "1 tensors missing and 0 too many, such as logit_bias"),
    ],
)
def test_weights_of_another_architecture(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        clipkit.load(broken(tmp_path, **changes))


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("vision_config", {"vision_use_head": False}, "vision_config.vision_use_head = False asks for"),
        ("vision_config", {"num_channels": 4}, "vision_config.num_channels = 4 asks for"),
        ("vision_config", {"image_size": [48, 64]}, r"vision_config.image_size is \[48, 64\]; clipkit has square"),
        ("vision_config", {"hidden_act": "swish"}, "vision_config.hidden_act 'swish' is not supported; known: quick"),
        ("vision_config", {"layer_norm_eps": 1e-3}, r"vision_config.layer_norm_eps 0\.001 is not supported"),
        ("vision_config", {"attention_bias": False}, "vision_config.attention_bias = False is unknown to clipkit"),
        ("text_config", {"hidden_act": "relu"}, "text_config.hidden_act 'relu' is not supported"),
        ("text_config", {"rope_theta": 1e4}, r"text_config.rope_theta = 10000\.0 is unknown to clipkit"),
        ("text_config", {"num_hidden_layers": None}, "text_config.num_hidden_layers = None must be of the type of 12"),
        ("text_config", {"pruned_heads": {"0": [1]}}, "text_config.pruned_heads = .* asks for"),
        ("", {"quantization_config": {"bits": 8}}, "config.json.quantization_config = .* is unknown to clipkit"),
        ("", {"auto_map": {"AutoModel": "code.Mine"}}, "config.json.auto_map = .* is unknown to clipkit"),
        ("", {"text_config": 3}, "text_config is 3; it must be a JSON object"),
    ],
)
def test_what_transformers_can_say_and_clipkit_cannot_do(section, change, message, tmp_path):
    hugging_face("Siglip", tmp_path, vocab_size=120)
    gemma(tmp_path, "PreTrainedTokenizerFast")
    config = json.loads((tmp_path / "config.json").read_text())
    (config[section] if section else config).update(change)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        clipkit.load(tmp_path)


def test_every_key_of_the_others_has_been_decided():
    """Read, built in, without effect: what their next version adds will be refused, and shows here first."""
    from dataclasses import fields

    model, transformers = open_clip.model, pytest.importorskip("transformers")
    from clipkit.convert import open_clip as ours
    from clipkit.convert.transformers import _sections

    vision = {*ours._VISION, *ours._VISION_BUILT_IN, *ours._VISION_FREE}
    assert {field.name for field in fields(model.CLIPVisionCfg)} <= vision
    text = {*ours._TEXT, *ours._TEXT_BUILT_IN, *ours._TEXT_FREE}
    assert {field.name for field in fields(model.CLIPTextCfg)} <= text
    for kind in ("CLIP", "Siglip"):
        config = getattr(transformers, f"{kind}Config")().to_dict()
        _sections(config, kind == "Siglip")


def test_weights_that_do_not_say_their_activation(tmp_path):
    model, _ = openai_state()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"nor whether its GELU is the quick one; put an open_clip_config\.json"):
        clipkit.load(tmp_path / "model.pt")


def test_a_folder_that_contradicts_what_is_known(tmp_path, monkeypatch):
    from clipkit.convert import hub

    folder = broken(tmp_path)
    monkeypatch.setattr(hub, "fetch", lambda published: folder)
    with pytest.raises(CheckpointError, match="the activation is gelu; these weights were trained with quick_gelu"):
        clipkit.load("ViT-B-32/openai")


def test_a_published_name_whose_gelu_is_the_tanh_approximation(tmp_path, monkeypatch):
    """SigLIP 2: not the quick GELU, and not the exact one."""
    from clipkit.convert import hub

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
            unpickling.read(tmp_path / "cut.pt")


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
    found = unpickling.read(tmp_path / "a.pt")
    assert found.tensors.keys() == state.keys()
    assert all(torch.equal(found.tensors[k], v) and found.tensors[k].dtype == v.dtype for k, v in state.items())


@pytest.mark.parametrize(
    "name",
    [
        "visual.conv1.weight",
        "module.module.visual.conv1.weight",
        "module._orig_mod.module.visual.conv1.weight",
        "visual._orig_mod.conv1.weight",
        "_fsdp_wrapped_module.visual._checkpoint_wrapped_module._orig_mod.conv1.weight",
    ],
)
def test_names_of_wrappers_are_taken_off_in_any_container(name, tmp_path):
    tensors = {name: torch.arange(3.0)}
    save_file(tensors, tmp_path / "a.safetensors")
    kinds = {"plain": tensors, "dict": {"state_dict": tensors, "epoch": 1}, "model": {"model": {"module": tensors}}}
    kinds["optimizer"] = {"model_state_dict": tensors, "optimizer": {"state": {0: torch.zeros(9)}}}
    for kind, content in kinds.items():
        torch.save(content, tmp_path / f"{kind}.pt")
    for path in sorted(tmp_path.iterdir()):
        found = unpickling.read(path).tensors
        assert list(found) == ["visual.conv1.weight"], path
        assert found["visual.conv1.weight"].tolist() == [0, 1, 2]


def test_names_that_only_look_like_wrappers_stay(tmp_path):
    """timm's iformer has blocks called `module`."""
    save_file({"trunk.blocks.0.module.weight": torch.zeros(1), "a_orig_mod.x": torch.zeros(1)}, tmp_path / "a")
    assert set(unpickling.read(tmp_path / "a").tensors) == {"trunk.blocks.0.module.weight", "a_orig_mod.x"}
    save_file({"x": torch.zeros(1), "module.x": torch.zeros(1)}, tmp_path / "b")
    with pytest.raises(CheckpointError, match="holds x twice, with and without a wrapper's name"):
        unpickling.read(tmp_path / "b")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_model_in_several_files(kind, tmp_path):
    model = hugging_face("CLIP", tmp_path, bos_token_id=49406, eos_token_id=49407, pad_token_id=1)
    whole = unpickling.read(tmp_path / "model.safetensors").tensors
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    index = tmp_path / "model.safetensors.index.json"
    if kind == "bin":
        for path in list(tmp_path.glob("*.safetensors")):
            torch.save(load_file(path), path.with_suffix(".bin"))
            path.unlink()
        index = index.rename(tmp_path / "pytorch_model.bin.index.json")
        index.write_text(index.read_text().replace(".safetensors", ".bin"))
    found = unpickling.read(index).tensors
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    clip = clipkit.load(tmp_path)
    same_features(
        clip,
        lambda x: pooled(model.get_image_features(x)),
        lambda x: pooled(model.get_text_features(x)),
        open_clip.tokenize(CAPTIONS),
    )


def sharded(folder, placed, **files):
    for name, tensors in files.items():
        save_file({tensor: torch.zeros(2) for tensor in tensors}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("placed", "files", "message"),
    [
        ({"x": "a", "y": "b"}, {"a": ["x"]}, "lists 2 files, 1 of which are missing: b"),
        ({"x": "a", "y": "b"}, {"a": ["x", "y"], "b": ["y"]}, "a holds y, which .* puts in b"),
        ({"x": "a"}, {"a": ["x", "y"]}, "a holds y, which .* puts nowhere"),
        ({"x": "a", "y": "a"}, {"a": ["x"]}, r"a does not hold y, which model\.safetensors\.index\.json puts there"),
        ({"x": "../a"}, {}, "lists '../a', which is not the name of a file beside it; refused"),
        ({"x": "/etc/passwd"}, {}, "lists '/etc/passwd', which is not the name of a file beside it"),
        ({"x": ".."}, {}, "lists '..', which is not the name"),
        ({"x": "b\\a"}, {}, "which is not the name of a file beside it"),
        ({"x": "model.safetensors.index.json"}, {}, "which is not the name of a file beside it"),
        ({"x": 3}, {}, "has no weight_map from tensors to files"),
        ({}, {}, "has no weight_map from tensors to files"),
    ],
)
def test_an_index_that_does_not_fit_its_files(placed, files, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        unpickling.read(sharded(tmp_path, placed, **files))


@pytest.mark.parametrize(
    ("content", "what"),
    [(b"", "empty"), (b"a photo of a cat\n", "a text file"), (b"\x89PNG\r\n\x1a\n" + bytes(50), "a picture")],
)
def test_files_that_hold_no_weights_are_called_what_they_are(content, what, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"x is {what}; weights are files of safetensors or torch.save"):
        clipkit.load(tmp_path / "x")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_nothing_in_an_archive_is_run(tmp_path):
    mark = tmp_path / "mark"
    torch.save({"w": torch.zeros(2), "x": Payload(mark)}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"it needs \w+\.open to be run, which clipkit does not"):
        unpickling.read(tmp_path / "bad.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Payload(mark)))
    with pytest.raises(CheckpointError, match="pickle of an old torch"):
        unpickling.read(tmp_path / "old.pt")
    assert not mark.exists()


def test_a_model_is_built_from_what_translate_gives():
    _, state = openai_state()
    config, tensors = weights.from_openai(state)
    assert CLIP(config, 49408, 49407).state_dict().keys() == tensors.keys()
