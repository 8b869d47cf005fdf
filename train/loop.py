"""The one training loop: pretraining, denoisers and noise-aware CLIPs all go through `train`.

A run is a folder. Each step's randomness is a function of (seed, step, rank), so the state of a run is its weights, its
optimizer and its step: the same command resumes, and on a CPU ends with the bits of an uninterrupted run.
"""

from __future__ import annotations

import copy
import dataclasses
import platform
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipkit import checkpoint, distributed
from clipkit._version import __version__
from clipkit.config import Recipe, from_dict
from clipkit.errors import CheckpointError, NonFiniteError, UsageError
from clipkit.records import Records, say
from clipkit.stream import Batch, Stream
from clipkit.train import optim, parallel
from clipkit.train.step import Task, backward


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bf16 where asked for, or where "auto" finds the hardware."""
    enabled = precision == "bf16" or (precision == "auto" and distributed.computes_in_bf16(device.type))
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def seed_everything(seed: int, step: int, rank: int) -> None:
    """Make what follows a function of these three numbers."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + rank)


def train(task: Task, stream: Stream, recipe: Recipe, device: torch.device) -> Path:
    """Train `task` on `stream` as the recipe says, resuming what lies in its `run.out` -> that folder.

    Raises CheckpointError if that folder holds a run of another recipe, NonFiniteError when the loss or the gradient is
    no longer a number.
    """
    run, folder = recipe.run, Path(recipe.run.out)
    task.to(device)
    loop = _Loop(task, recipe, device)
    start = loop.resume(folder)
    main = distributed.rank() == 0
    if main:
        parameters = sum(p.numel() for p in task.model.parameters())
        where = f"{device}, {distributed.world_size()} rank(s)"
        say(f"{task.kind}: {parameters / 1e6:.2f}M parameters on {where}, step {start} of {run.steps}, in {folder}")
    records = Records(folder, start, run.steps, task.kind, run.tensorboard, main)
    try:
        loop.steps(stream, start, folder, records)
    finally:
        records.close()
    return folder


class _Loop:
    """State of one run, and its steps."""

    def __init__(self, task: Task, recipe: Recipe, device: torch.device) -> None:
        self.task, self.recipe, self.device = task, recipe, device
        self.run, self.config = run, config = recipe.run, recipe.optim
        if run.sync_batchnorm:
            _synchronise_batchnorm(task.model, device)
        if run.compile:
            for network in task.networks():
                network.compile(dynamic=False)
        self.parallel = parallel.share(task, run.parallel, device)
        self.optimizer = optim.make_optimizer(task.model, config, task.lr_scales())
        self.ema = optim.EMA(task.model, run.ema_decay)
        self.skipped: Counter[str] = Counter()
        self.guard = _Guard(device)

    def resume(self, folder: Path) -> int:
        """Load the newest checkpoint of the run -> steps already done."""
        folder.mkdir(parents=True, exist_ok=True)
        found = checkpoint.latest(folder)
        if found is None:
            return 0
        _same_recipe(found, self.recipe)
        for there, here in (("model", self.task.model.state_dict()), ("ema", self.ema.shadow)):
            for name, tensor in found.tensors(there).items():
                here[name].copy_(parallel.like(tensor, here[name]))
        _load_optimizer(self.optimizer, found.tensors("optimizer"))
        return found.step

    def steps(self, stream: Stream, start: int, folder: Path, records: Records) -> None:
        """Run from step `start` to the end, logging, evaluating and saving when due."""
        run, meter = self.run, _Meter(self.device)
        self.task.train()
        batches = stream.batches(start, run.steps)
        for step in range(start, run.steps):
            meter.waiting()
            batch = next(batches)
            meter.working()
            values = self.step(step, batch)
            meter.add(len(batch.captions) * distributed.world_size(), values)
            self.skipped += batch.skipped
            records.bar.update(1)
            done, last = step + 1, step + 1 == run.steps
            evaluate = last or (run.eval_every and done % run.eval_every == 0)
            if done % run.log_every == 0 or done % run.save_every == 0 or evaluate:
                self.guard.check()
            if done % run.log_every == 0 or last:
                line = {**meter.take(), "lr": optim.learning_rate(step, run.steps, self.config)}
                records.write(done, {**line, **({"skipped": dict(self.skipped)} if self.skipped else {})})
            if evaluate and (scores := self.evaluate()):
                records.write(done, scores)
            if last or done % run.save_every == 0:
                self.save(folder, done)

    def step(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """One optimizer step -> values to log. Raises NonFiniteError, on every rank, before any weight changes."""
        seed_everything(self.run.seed, step, distributed.rank())
        for group in self.optimizer.param_groups:
            group["lr"] = optim.learning_rate(step, self.run.steps, self.config) * group["lr_scale"]
        self.optimizer.zero_grad(set_to_none=True)
        precision = partial(autocast, self.device, self.run.precision)
        loss, values = backward(self.task, batch.to(self.device), self.run.micro_batches, self.parallel, precision)
        norm = parallel.finish_gradients(self.task.parameters(), self.run.grad_clip)
        self.optimizer.found_inf = self.guard.watch(step, loss, norm, batch.keys)
        self.optimizer.step()
        self.task.after_step()
        distributed.average_buffers(self.task.model)
        self.ema.update(self.task.model, step)
        return {"loss": loss, "grad_norm": norm, **values}

    def evaluate(self) -> dict[str, float]:
        """Scores of the averaged weights; the trained ones come back afterwards."""
        trained = copy.deepcopy(self.task.model.state_dict())
        self.task.model.load_state_dict(self.ema.shadow)
        self.task.eval()
        with torch.no_grad(), autocast(self.device, self.run.precision):
            scores = self.task.evaluate(self.device)
        self.task.model.load_state_dict(trained)
        self.task.train()
        return scores

    def save(self, folder: Path, step: int) -> None:
        """Put the state together, and write it as a checkpoint on rank 0 while the others wait."""
        tensors = {
            "model": parallel.whole(self.task.model.state_dict()),
            "ema": parallel.whole(self.ema.shadow),
            "optimizer": parallel.whole(_optimizer_tensors(self.optimizer)),
        }
        if distributed.rank() == 0:
            state = {
                "kind": self.task.kind,
                "step": step,
                "recipe": dataclasses.asdict(self.recipe),
                "versions": _versions(),
            }
            checkpoint.save(folder, state, tensors, self.task.texts(), self.run.keep_last)
        distributed.barrier()


class _Guard:
    """Stops a run whose loss or gradient is no longer a number, before the optimizer step that it would spoil.

    A GPU is not waited for at each step: from the first bad one on, the optimizer is told on the device to change
    nothing, and the run stops when the host next looks. A CPU looks at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.halted, self.waits = torch.zeros((), device=device), device.type == "cpu"
        self.recent: list[tuple[int, Tensor, Tensor, list[str]]] = []

    def watch(self, step: int, loss: Tensor, norm: Tensor, keys: list[str]) -> Tensor:
        """Take in a step -> 1 from the first bad one on, else 0; what AdamW's kernels call found_inf."""
        # A bad loss on one rank reaches every rank through the averaged gradient, so all stop at the same step.
        self.halted = torch.maximum(self.halted, (~torch.isfinite(norm)).to(self.halted))
        self.recent.append((step, loss, norm, keys))
        if self.waits:
            self.check()
        return self.halted

    def check(self) -> None:
        """Raises NonFiniteError naming the first bad step since the last look, on every rank."""
        if float(self.halted):
            step, loss, norm, keys = next(r for r in self.recent if not torch.isfinite(r[2]))
            raise NonFiniteError(
                f"step {step}: loss {float(loss):g}, gradient norm {float(norm):g} on rank {distributed.rank()}; "
                f"no weight was changed. Lower optim.lr, or look at samples {', '.join(keys[:3])} ..."
            )
        self.recent.clear()


class _Meter:
    """Means of the logged values, throughput, and the share of time spent waiting for data."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._mark = time.perf_counter()
        self._reset()

    def _reset(self) -> None:
        self._samples, self._wait, self._count = 0, 0.0, 0
        self._sums: dict[str, Tensor] = {}
        self._began = time.perf_counter()

    def waiting(self) -> None:
        self._mark = time.perf_counter()

    def working(self) -> None:
        self._wait += time.perf_counter() - self._mark

    def add(self, samples: int, values: Mapping[str, Tensor]) -> None:
        self._samples, self._count = self._samples + samples, self._count + 1
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value.detach() if name in self._sums else value.detach().clone()

    def take(self) -> dict[str, float]:
        """Means since the last call; the only place where a step waits for the device."""
        names = list(self._sums)
        stacked = torch.stack([self._sums[n].float() for n in names]) / self._count
        means = (distributed.sum_over_ranks(stacked) / distributed.world_size()).tolist()
        elapsed = time.perf_counter() - self._began
        line = {**dict(zip(names, means, strict=True)), "samples_per_s": self._samples / elapsed}
        line["data_wait"] = self._wait / elapsed
        self._reset()
        return line


def _synchronise_batchnorm(model: nn.Module, device: torch.device) -> None:
    if device.type != "cuda":
        raise UsageError(f"run.sync_batchnorm needs GPUs, and this run is on {device}: torch has it for CUDA only")
    nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]


def _versions() -> dict[str, str]:
    return {"clipkit": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat names: `<parameter number>.<quantity>`, numbered over all groups."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        number, _, quantity = name.partition(".")
        parameter = parameters[int(number)]
        # In the parameter's own memory format: the fused kernel walks all of a parameter's tensors in one order.
        if tensor.shape == parameter.shape:
            tensor = torch.empty_like(parameter).copy_(parallel.like(tensor, parameter))
        optimizer.state[parameter][quantity] = tensor


_FREE_TO_CHANGE = {"data.workers"} | {
    f"run.{key}"
    for key in ("out", "device", "log_every", "save_every", "keep_last", "eval_every", "tensorboard", "parallel")
}


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """{"section.key": value}; a section that is not there has no keys."""
    return {f"{section}.{key}": v for section, values in recipe.items() for key, v in (values or {}).items()}


def _same_recipe(found: checkpoint.Checkpoint, recipe: Recipe) -> None:
    """Refuse to resume a run with a recipe that would have trained something else. Raises CheckpointError."""
    there = from_dict(type(recipe), found.state["recipe"])  # keys that are younger than the run have their defaults
    ours, theirs = _flat(dataclasses.asdict(recipe)), _flat(dataclasses.asdict(there))
    keys = [key for key in {**theirs, **ours} if key not in _FREE_TO_CHANGE]
    changed = [
        f"{key}: {_show(theirs.get(key))} there, {_show(ours.get(key))} here"
        for key in keys
        if theirs.get(key) != ours.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"{found.path.parent.parent} holds a run of another recipe ({'; '.join(changed)}); "
            "give run.out another folder, or the recipe its old values"
        )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
