"""Estimates of a recipe's cost: time of a step and memory of a rank, computed without running it.

FLOPs and kept activations are counted on torch's meta device. The time of a device is estimated from its published
peaks (of a CPU from a timed matrix product) and the utilisation that training reaches. Loading is timed on samples of
the recipe's packs, if they are on this machine.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from clipkit.data.loader import Batch, Stream
from clipkit.data.shards import Shards
from clipkit.distributed import computes_in_bf16
from clipkit.errors import ClipkitError, UsageError
from clipkit.models.clip import CLIP
from clipkit.train import progressive
from clipkit.train.distil import Teachers
from clipkit.train.finetune import lock
from clipkit.train.losses import GATHERED
from clipkit.train.pretrain import PretrainRecipe

CLIP_VOCABULARY = 49408
_MESSAGE = 20e-6
"""Seconds that a message takes beside its bytes."""


@dataclass(frozen=True)
class Device:
    """Peaks of one device. fp32, bf16: operations/s of dense matrix products; memory, node, network: bytes/s."""

    fp32: float
    bf16: float
    """0 where the hardware does not compute in it."""
    memory: float
    node: float
    network: float
    bytes: int
    reached: float
    """Share of the products' peak that a training step reaches."""


# NVIDIA's data sheets: fp32 without TF32, dense bf16, memory, NVLink one way, a 400 (200, 100) Gb/s adapter each.
# The share reached is an assumption; `benchmarks/train_step.py` measures it where there is a GPU.
DEVICES = {
    "h100": Device(67e12, 989e12, 3.35e12, 450e9, 50e9, 80 * 2**30, 0.4),
    "a100": Device(19.5e12, 312e12, 2.0e12, 300e9, 25e9, 80 * 2**30, 0.4),
    "v100": Device(15.7e12, 0, 0.9e12, 150e9, 12.5e9, 32 * 2**30, 0.35),
}


def this_cpu(ranks: int) -> Device:
    """One of `ranks` equal parts of the CPU that we are on, from timed products of 1,024-square matrices."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // ranks))
    try:
        fp32 = _timed_product(torch.float32)
        bf16 = _timed_product(torch.bfloat16) if computes_in_bf16("cpu") else 0
    finally:
        torch.set_num_threads(before)
    # Gloo over shared memory moves some 2 GB/s; convolutions and elementwise work take as long again as the products.
    return Device(fp32, bf16, 10e9, 2e9, 1e9, 0, 0.5)


def _timed_product(dtype: torch.dtype) -> float:
    """Operations/s of the best of six."""
    a, times = torch.randn(1024, 1024).to(dtype), []
    for _ in range(6):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return 2 * 1024**3 / min(times)


def loading_time(recipe: PretrainRecipe, samples: int = 64) -> float | None:
    """Seconds in which one process of this machine reads and varies a sample; None where the packs are not on it."""
    data, size = replace(recipe.data, workers=0), recipe.model.image_size
    if any("://" in source for source in (data.shards, *data.mix)):
        return None
    early = recipe.data.progressive_size or size
    try:
        # A batch of small pictures, then one of the model's.
        stream = Stream(Shards(data.shards, verify=False), data, size, samples, 0, early_size=early, early_steps=1)
        return progressive.mean_over_steps(_timed_loading(stream, 0), _timed_loading(stream, 1))
    except (ClipkitError, OSError):
        return None


def _timed_loading(stream: Stream, step: int) -> float:
    """Seconds per sample, the best of three; the first finds the files on the disk."""
    times = []
    positions = stream.positions(step)
    for _ in range(3):
        began = time.perf_counter()
        stream.samples.__getitems__(positions)
        times.append(time.perf_counter() - began)
    return min(times) / len(positions)


@dataclass(frozen=True)
class Plan:
    """Seconds of one step and bytes of one rank, with their terms."""

    ranks: int
    batch_per_rank: int
    parameters: int
    trained_parameters: int
    """Those of no locked tower."""
    flops_per_sample: float
    compute_s: float
    optimizer_s: float
    gradients_s: float
    """Averaging gradients: over the network a ring of 2 (W - 1) / W times their bytes."""
    contrast_s: float
    """Text features of all ranks to each, and their gradients back: gathered or by a ring, as the loss does it."""
    contrast_gathered_s: float
    """Of the two ways the one: features gathered, gradients summed."""
    contrast_ring_s: float
    """The other: features travel once forward and once backward, gradients once, each in W - 1 messages."""
    loading_s: float | None
    """One process's time for a rank's samples: added to the step without loader processes, else shared by them and
    hidden behind it. None if it is not known; the step is then as if it took no time."""
    workers_wanted: int | None
    """`data.workers` that keep up with the rank."""
    step_s: float
    samples_per_s: float
    weights_bytes: int
    """Parameters and their moving average; gradients and both moments of those trained; in fp32."""
    activations_bytes: int
    loss_bytes: int
    memory_bytes: int


def plan(
    recipe: PretrainRecipe,
    ranks: int,
    device: Device,
    per_node: int = 8,
    caption_tokens: int = 16,
    loading: float | None = None,
) -> Plan:
    """Estimate one step of `recipe` on `ranks` devices, where `loading` is what `loading_time` found.

    Raises UsageError for ranks that do not divide the batch.
    """
    run = recipe.run
    if run.batch_size % ranks:
        raise UsageError(f"batch_size {run.batch_size} does not divide over {ranks} ranks; change run.batch_size")
    batch = run.batch_size // ranks
    counted = _count_training(recipe, caption_tokens)
    shards = ranks if run.parallel == "fsdp" else 1
    bf16 = run.precision == "bf16" or (run.precision == "auto" and device.bf16 > 0)
    flops_per_s, half = (device.bf16 or device.fp32, 0.5) if bf16 else (device.fp32, 1.0)
    twice = 4 / 3 if run.micro_batches > 1 else 1.0  # GradCache's first forward pass
    compute = counted.flops * batch * twice / (flops_per_s * device.reached)
    trained = 4 * counted.trained
    optimizer = (
        7 * trained / shards / device.memory
    )  # gradient, weight and moments read; weight, moments, average written
    link = device.node if ranks <= per_node else device.network
    gradients = (2 if shards == 1 else 3) * (ranks - 1) / ranks * trained / link
    contrast = _count_contrast(run.batch_size, recipe.model.embed_dim, ranks, link)
    hidden = 0.0 if device.bytes == 0 else 0.8 * min(gradients, compute / 2)  # behind the backward pass
    computed = compute + optimizer + gradients - hidden + contrast.seconds
    load = None if loading is None else loading * batch
    step = _with_loading(computed, load or 0.0, recipe.data.workers)
    state = (2 * 4 * counted.parameters + 3 * trained) // shards
    activations = int(counted.kept * half * -(-batch // run.micro_batches))
    return Plan(
        ranks=ranks,
        batch_per_rank=batch,
        parameters=counted.parameters,
        trained_parameters=counted.trained,
        flops_per_sample=counted.flops,
        compute_s=compute,
        optimizer_s=optimizer,
        gradients_s=gradients,
        contrast_s=contrast.seconds,
        contrast_gathered_s=contrast.gathered,
        contrast_ring_s=contrast.ring,
        loading_s=load,
        workers_wanted=None if load is None else math.ceil(load / computed),
        step_s=step,
        samples_per_s=run.batch_size / step,
        weights_bytes=state,
        activations_bytes=activations,
        loss_bytes=contrast.memory,
        memory_bytes=state + activations + contrast.memory,
    )


@dataclass(frozen=True)
class _Contrast:
    """Seconds that features of all ranks take to reach each, in the way the loss takes and in both; bytes it holds."""

    seconds: float
    gathered: float
    ring: float
    memory: int


def _count_contrast(batch: int, embed_dim: int, ranks: int, link: float) -> _Contrast:
    features = 4 * batch * embed_dim
    gathered = 3 * (ranks - 1) / ranks * features / link
    ring = gathered + 3 * (ranks - 1) * _MESSAGE
    ring_used = features > GATHERED and ranks > 1
    columns, blocks = (batch // ranks, 6 * features // ranks) if ring_used else (batch, 4 * features)
    strips = 5 * 4 * 128 * columns
    # Beside the strips: features and gradients of all ranks, or of one other, and one's own.
    return _Contrast(ring if ring_used else gathered, gathered, ring, strips + blocks)


def _with_loading(computed: float, load: float, workers: int) -> float:
    """Seconds of a step that computes for `computed`, and whose samples take one process `load`."""
    return max(computed, load / workers) if workers else computed + load


@dataclass(frozen=True)
class _Counted:
    """Operations of a training step and bytes kept for its backward pass, per sample; parameters, and those trained."""

    flops: float
    kept: float
    parameters: int
    trained: int


def _count_training(recipe: PretrainRecipe, caption_tokens: int) -> _Counted:
    """Mean operations and most bytes of a whole training."""
    counted = _count(recipe, caption_tokens, recipe.model.image_size)
    if not recipe.data.progressive_size:
        return counted
    early = _count(recipe, caption_tokens, recipe.data.progressive_size)
    flops = progressive.mean_over_steps(early.flops, counted.flops)
    return replace(counted, flops=flops, kept=max(early.kept, counted.kept))


def _count(recipe: PretrainRecipe, caption_tokens: int, size: int) -> _Counted:
    config = recipe.model
    samples = 4
    vocabulary = CLIP_VOCABULARY if config.merges else config.vocab_size
    with torch.device("meta"):
        model = CLIP(config, vocabulary, end_id=2)
        images = torch.zeros(samples, 3, size, size)
    lock(model, recipe.finetune)
    ids = torch.zeros(samples, min(caption_tokens, config.context_length), dtype=torch.int64)
    ids[:, -1] = 2
    own = {id(p) for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            features = [model.encode_image(images), model.encode_text(ids)]
        torch.autograd.backward([f.sum() for f in features if f.requires_grad])
        if recipe.distil.teachers:
            pixels = torch.zeros(samples, 3, size, size, dtype=torch.uint8)
            captions = ["a " * (ids.shape[1] - 2)] * samples
            batch = Batch(pixels, captions, torch.zeros(samples, dtype=torch.int64), [""] * samples)
            Teachers(recipe.distil, config.embed_dim)(model, batch, recipe.data.flip)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return _Counted(
        flops=counter.get_total_flops() / samples,
        kept=sum(kept.values()) / samples,
        parameters=sum(n for n, _ in sizes),
        trained=sum(n for n, trained in sizes if trained),
    )
