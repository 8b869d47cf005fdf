"""Safe unpickling: tensors from safetensors, torch.save and TorchScript files of any origin, without running code.

safetensors hold no code. A file of torch.save is a zip archive of raw numbers and a pickle that describes them, and
pickles run code: this one is read by an unpickler that builds tensors, lists and dictionaries, and refuses everything
else. A TorchScript archive has modules instead of dictionaries; its code is not read. Large models are sharded over
several files, with an index that maps tensors to files.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipkit.errors import CheckpointError
from clipkit.io import read_object

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


INDEX = ".index.json"
"""How the name of the index of a model in several files ends."""
_CONTAINERS = ("state_dict", "model", "model_state_dict", "module")
"""Where training checkpoints keep the weights, beside the optimizer's state."""
# torch.compile and FSDP wrap any module, DistributedDataParallel the whole model. ("module" inside is timm's too.)
_WRAPPER = re.compile(r"^module\.|(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_HEADS = {b"\xff\xd8\xff": "a picture", b"\x89PNG": "a picture", b"RIFF": "a picture", b"GIF8": "a picture"}


class Archive(NamedTuple):
    """Tensors by name, and whether the file was TorchScript's."""

    tensors: dict[str, Tensor]
    scripted: bool


def read(path: Path) -> Archive:
    """The tensors of a .safetensors, a file of torch.save, a TorchScript archive, or an index of several such files.

    The weights are found inside a training checkpoint, and the prefixes of torch.compile, DistributedDataParallel and
    FSDP are removed from the names.
    Raises CheckpointError for files that are damaged, of another kind, or in need of running code.
    """
    found = _read_sharded(path) if path.name.endswith(INDEX) else _read_file(path)
    tensors: dict[str, Tensor] = {}
    for name, tensor in found.tensors.items():
        if (plain := _unwrapped(name)) in tensors:
            raise CheckpointError(f"{path} holds {plain} twice, with and without a wrapper's name before it")
        tensors[plain] = tensor
    return Archive(tensors, found.scripted)


def _unwrapped(name: str) -> str:
    while (shorter := _WRAPPER.sub("", name)) != name:
        name = shorter
    return name


def shards(index: Path) -> list[str]:
    """The files that an index lists. Raises CheckpointError for one that is not beside it, or no index at all."""
    placed = read_object(index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files; fetch it again")
    files = sorted(set(placed.values()))
    for file in files:
        if file in ("", ".", "..") or "/" in file or "\\" in file or file.endswith(INDEX):
            raise CheckpointError(f"{index} lists {file!r}, which is not the name of a file beside it; refused")
    return files


def _read_sharded(index: Path) -> Archive:
    files, placed = shards(index), read_object(index)["weight_map"]
    if missing := [file for file in files if not index.with_name(file).is_file()]:
        raise CheckpointError(f"{index} lists {len(files)} files, {len(missing)} of which are missing: {missing[0]}")
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in _read_file(index.with_name(file)).tensors.items():
            if placed.get(name) != file:
                where = f"in {placed[name]}" if name in placed else "nowhere"
                raise CheckpointError(f"{index.with_name(file)} holds {name}, which {index.name} puts {where}")
            tensors[name] = tensor
    if absent := sorted(placed.keys() - tensors.keys()):
        name = absent[0]
        raise CheckpointError(f"{index.with_name(placed[name])} does not hold {name}, which {index.name} puts there")
    return Archive(tensors, False)


def _read_file(path: Path) -> Archive:
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
    if head.startswith(b"PK\x03\x04"):
        return _read_zip(path)
    if (kind := _other_kind(head)) is not None:
        raise CheckpointError(f"{path} is {kind}; weights are files of safetensors or torch.save, or a folder of them")
    if path.suffix in (".pt", ".pth", ".bin"):
        raise CheckpointError(f"{path} is a pickle of an old torch, or damaged; save it again with torch 1.6 or later")
    return Archive(_read_safetensors(path), False)


def _other_kind(head: bytes) -> str | None:
    """The kind of a file without weights, by its first bytes."""
    if not head:
        return "empty"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if not head.strip(bytes(range(32, 127)) + b"\t\r\n"):
        return "a text file"
    return next((kind for start, kind in _HEADS.items() if head.startswith(start)), None)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged or no safetensors file ({str(error)[:100]}); fetch it again"
        ) from None
    return tensors


def _read_zip(path: Path) -> Archive:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if PurePosixPath(n).name == "data.pkl"]
            if not names:
                raise CheckpointError(f"{path} is a zip archive without data.pkl; it is no file of torch.save")
            if any(i.compress_type != zipfile.ZIP_STORED for i in archive.infolist() if not _is_code(i.filename)):
                raise CheckpointError(f"{path} is compressed, which torch never does; refused")
            found = _Unpickler(archive, PurePosixPath(min(names, key=len)).parent).load()
            scripted = isinstance(found, _Module)
            tensors = dict(_flatten(_weights_in(found), ""))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # damaged pickles raise whatever they run into
        raise CheckpointError(f"{path} is damaged ({str(error)[:100]}); fetch it again") from None
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    return Archive(tensors, scripted)


def _weights_in(found: Any) -> Any:
    while isinstance(found, dict):
        inner = next((found[key] for key in _CONTAINERS if isinstance(found.get(key), dict)), None)
        if inner is None:
            break
        found = inner
    return found


def _is_code(name: str) -> bool:
    return "code" in PurePosixPath(name).parts


class _Module:
    """Takes the place of a TorchScript module: attributes, no methods."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: PurePosixPath) -> None:
        super().__init__(io.BytesIO(archive.read(str(root / "data.pkl"))), encoding="utf-8")
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _rebuild
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, requires_grad, hooks: data
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.split(".")[0] == "__torch__":
            return type(name, (_Module,), {})
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return lambda values: values
        raise CheckpointError(
            f"it needs {module}.{name} to be run, which clipkit does not; keep the weights alone, as safetensors or a "
            "state dict"
        )

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, count = pid
        if key not in self._storages:
            data = bytearray(self._archive.read(str(self._root / "data" / str(key))))
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        if len(self._storages[key]) < count:
            raise CheckpointError(f"storage {key} holds {len(self._storages[key])} numbers of {count}")
        return self._storages[key]


def _rebuild(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if min([offset, *size, *stride], default=0) < 0 or (0 not in size and last >= len(storage)):
        raise CheckpointError("a tensor reaches beyond its storage")
    return storage.as_strided(size, stride, offset)


def _flatten(value: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield prefix, value
    elif isinstance(value, (dict, _Module)):
        for name, inner in (value if isinstance(value, dict) else vars(value)).items():
            yield from _flatten(inner, f"{prefix}.{name}" if prefix else str(name))
