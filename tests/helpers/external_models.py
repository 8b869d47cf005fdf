"""What other people write: models with random weights, and data sets, in their own formats."""

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
CONFIGS = {
    "ViT-B-32": {"embed_dim": 32, "vision_cfg": {"image_size": 64, "layers": 2, "width": 128, "patch_size": 32}},
    "ViT-B-16 quick": {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16},
    },
    "ViT-L-14": {"embed_dim": 48, "vision_cfg": {"image_size": 70, "layers": 3, "width": 192, "patch_size": 14}},
    "ViT-g": {
        "embed_dim": 48,
        "vision_cfg": {
            "image_size": 28,
            "layers": 2,
            "width": 176,
            "head_width": 88,
            "mlp_ratio": 4.36,
            "patch_size": 14,
        },
    },
    "RN50": {"embed_dim": 64, "vision_cfg": {"image_size": 64, "layers": [3, 4, 6, 3], "width": 64}},
    "convnext": {
        "embed_dim": 40,
        "vision_cfg": {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear", "image_size": 64},
    },
    "convnext mlp": {
        "embed_dim": 40,
        "vision_cfg": {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "mlp", "image_size": 64},
    },
    "MobileCLIP": {
        "embed_dim": 40,
        "custom_text": True,
        "text_cfg": {"no_causal_mask": True},
        "vision_cfg": {"timm_model_name": "fastvit_mci0", "timm_pool": "avg", "timm_proj": None, "image_size": 64},
    },
    "PE": {
        "embed_dim": 40,
        "custom_text": True,
        "vision_cfg": {"timm_model_name": "vit_pe_core_tiny_patch16_384", "timm_pool": "map", "timm_proj": None}
        | {"image_size": 384},
    },
}


def shaken(model):
    """Norms, biases and statistics are ones and zeros at the start; a mapping that mixes them up must show."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim <= 1:
                tensor.add_(torch.rand_like(tensor) * (1 if name.endswith("weight") else 0.05))
            elif "pos" in name:
                tensor.normal_(std=0.1)
    return model.eval()


def theirs(config):
    """open_clip's model of this configuration."""
    import open_clip

    arguments = dict(config)
    kind = open_clip.model.CustomTextCLIP if arguments.pop("custom_text", False) else open_clip.model.CLIP
    return shaken(kind(**arguments))


def written(folder, config, model, **seen):
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": seen}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def write_fashion_mnist(folder: Path, train, test) -> None:
    """idx files as torchvision unpacks them: (bytes [N, 28, 28], labels) of both parts."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for split, (pixels, labels) in (("train", train), ("t10k", test)):
        head = struct.pack(">iiii", 2051, len(pixels), 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 2049, len(labels)) + bytes(labels))
