"""The training loop of every task: `train`.

A run is a folder. The randomness of a step is a function of (seed, step, rank), so that the state of a run is its
weights, its optimizer and its step: the same command resumes, and on a CPU the resumed run is bit-identical to an
uninterrupted one. Checkpoints are saved every so many steps and minutes, and when a signal ends the run.
"""

from __future__ import annotations

import copy
import dataclasses
import platform
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from clipkit import checkpoint, distributed
from clipkit._version import __version__
from clipkit.async_checkpoint import Saver, lock
from clipkit.config import Recipe
from clipkit.data.loader import Batch, Stream
from clipkit.errors import CheckpointError, NonFiniteError, UsageError
from clipkit.log import Records, say
from clipkit.malloc import keep_pages
from clipkit.train import batchnorm, optim, parallel
from clipkit.train.resume import check_models, check_recipe
from clipkit.train.signals import Interruption
from clipkit.train.step import backward
from clipkit.train.task import Task


def precision_of(device: torch.device, asked: str) -> Literal["fp32", "bf16"]:
    """Mixed precision of a device: bf16 if asked for, or if "auto" finds hardware for it."""
    return "bf16" if asked == "bf16" or (asked == "auto" and distributed.computes_in_bf16(device.type)) else "fp32"


def autocast(device: torch.device, asked: str) -> AbstractContextManager[Any]:
    """Mixed precision: the context in which the networks are called."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision_of(device, asked) == "bf16")


def seed_everything(seed: int, step: int, rank: int) -> None:
    """Seed the generators with a function of these three numbers."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**64)  # both factors are odd: seeds stay apart


def train(task: Task, stream: Stream, recipe: Recipe, device: torch.device) -> Path:
    """Train `task` on `stream` by the recipe, resuming the run in its `run.out` -> that folder.

    Ends early, saved, on SIGTERM and SIGHUP (StoppedError) and Ctrl-C (KeyboardInterrupt). Raises CheckpointError if
    that folder holds a run of another recipe or is being trained by another process, NonFiniteError when the loss or
    the gradient is no longer a number, RankError when another rank dies or hangs.
    """
    folder, main = Path(recipe.run.out), distributed.rank() == 0
    task.to(device).train()
    with lock(folder) if main else nullcontext():
        loop = _Loop(task, recipe, device)
        start = loop.resume(folder)
        if main:
            parameters = sum(p.numel() for p in task.model.parameters())
            where = f"{device} in {precision_of(device, recipe.run.precision)}, {distributed.world_size()} rank(s)"
            say(
                f"{task.kind}: {parameters / 1e6:.2f}M parameters on {where}, step {start} of {recipe.run.steps}, "
                f"in {folder}"
            )
            if start >= recipe.run.steps:
                say(f"{folder} has done its {start} steps; a larger run.steps makes it longer")
            for line in batchnorm.limits(task, recipe.run):
                say(line)
        records = Records(folder, start, recipe.run.steps, task.kind, recipe.run.tensorboard, main)
        with records, loop.saver, keep_pages():
            loop.steps(stream, start, records)
        distributed.barrier()
    return folder


class _Loop:
    """A run: its model, optimizer, moving average and checkpoints, and its steps."""

    def __init__(self, task: Task, recipe: Recipe, device: torch.device) -> None:
        self.task = task
        self.recipe = recipe
        self.device = device
        self.run = run = recipe.run
        self.config = config = recipe.optim
        if run.sync_batchnorm and distributed.world_size() > 1:
            batchnorm.synchronise(task)
        if run.compile:
            for network in task.compile_targets():
                network.compile(dynamic=False)
        self.parallel = parallel.wrap(task, run.parallel, device)
        self.optimizer = optim.make_optimizer(task.model, config, task.lr_scales())
        self.ema = optim.EMA(task.model, run.ema_decay)
        self.guard = _Guard(device)
        self.saver = Saver(Path(run.out), run.keep_last, run.keep_every)
        self.saved = 0
        self.saved_at = time.monotonic()
        self.epoch: Counter[str] = Counter()  # samples seen, and skipped by reason; rank 0 has the resumed counts

    def resume(self, folder: Path) -> int:
        """Load the newest checkpoint of the run, if any -> steps already done."""
        folder.mkdir(parents=True, exist_ok=True)
        found = checkpoint.latest(folder)
        if found is None:
            return 0
        if found.state.get("kind") != self.task.kind:
            raise CheckpointError(
                f"{folder} holds a run of another kind ({found.state.get('kind')} there, {self.task.kind} here); "
                "give run.out another folder"
            )
        news = check_recipe(found, self.recipe)
        check_models(found, self.task.extra_files())
        if batchnorm.over_ranks(self.task) and found.state["recipe"]["run"].get("sync_batchnorm") is not True:
            news.append(f"run.sync_batchnorm: from step {found.step} on BatchNorm takes its statistics over all ranks")
        if distributed.rank() == 0:
            for line in news:
                say(line)
        for name_there, here in (("model", self.task.model.state_dict()), ("ema", self.ema.shadow)):
            for name, tensor in found.stream(name_there):
                here[name].copy_(parallel.shard_like(tensor, here[name]))
        _load_optimizer(self.optimizer, found.stream("optimizer"))
        if distributed.rank() == 0:
            self.epoch.update(found.state.get("epoch", {}))
        self.saved = found.step
        return found.step

    def steps(self, stream: Stream, start: int, records: Records) -> None:
        """Run from step `start` to the end, logging, evaluating and saving when due."""
        run = self.run
        meter = _Meter(self.device)
        batches, step = stream.batches(start, run.steps), start
        with Interruption() as interruption:
            try:
                for step in range(start, run.steps):
                    self.save_or_stop(step, interruption)
                    meter.waiting()
                    batch = next(batches)
                    meter.working()
                    values = self.step(step, batch)
                    meter.add(len(batch.captions) * distributed.world_size(), values)
                    self.epoch.update({"seen": len(batch) + batch.skipped.total(), **batch.skipped})
                    records.bar.update(1)
                    self.record(stream, step + 1, meter, records)
                next(batches, None)  # reports damage found by hashing the shards
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise UsageError(
                    "BatchNorm needs more than one sample at a time; raise run.batch_size or lower run.micro_batches"
                ) from error
            except (RuntimeError, ConnectionError, EOFError) as error:
                explained = stream.explain(error)
                raise (
                    explained if explained is not error else distributed.explain(error, step, run.timeout_minutes)
                ) from error

    def save_or_stop(self, step: int, interruption: Interruption) -> None:
        """Before a step, save or stop if any rank's clock or signal asks for it; all ranks do the same."""
        overdue = distributed.rank() == 0 and time.monotonic() - self.saved_at > 60 * self.run.save_minutes
        stop = 1 + interruption.signal if interruption.signal else 0
        asked = distributed.all_reduce_max(max(int(overdue), stop))
        if asked:
            self.guard.check()
            self.save(step)
        if asked > 1:
            self.saver.wait()
            interruption.obey(asked - 1, step)

    def record(self, stream: Stream, done: int, meter: _Meter, records: Records) -> None:
        """After a step: log line, end of the epoch, evaluation, checkpoint."""
        run = self.run
        last = done == self.run.steps
        evaluate = last or (run.eval_every and done % run.eval_every == 0)
        if done % run.log_every == 0 or done % run.save_every == 0 or evaluate:
            self.guard.check()
        if done % run.log_every == 0 or last:
            line = {**meter.take(), "lr": optim.learning_rate(done - 1, run.steps, self.config)}
            skipped = _without_seen(distributed.sum_counts(self.epoch))
            records.write(done, {**line, **({"skipped": skipped} if skipped else {})})
        if (epoch := stream.epoch(done)) != stream.epoch(done - 1):
            counts = distributed.sum_counts(self.epoch)
            indexed = {"not_indexed": stream.not_indexed} if stream.not_indexed else {}
            records.write(done, {"epoch": epoch, "seen": counts["seen"], "skipped": _without_seen(counts), **indexed})
            self.epoch.clear()
        if evaluate and (scores := self.evaluate()):
            records.write(done, scores)
        if last or done % run.save_every == 0:
            self.save(done)
        self.saver.check()

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
        with precision():
            self.optimizer.step()
        self.task.after_step()
        distributed.average_buffers(self.task.model)
        self.ema.update(self.task.model, step)
        return {"loss": loss, "grad_norm": norm, **values}

    def evaluate(self) -> dict[str, float]:
        """Scores of the moving average of the weights; the trained weights are restored afterwards."""
        trained = copy.deepcopy(self.task.model.state_dict())
        self.task.model.load_state_dict(self.ema.shadow)
        self.task.eval()
        with torch.no_grad(), autocast(self.device, self.run.precision):
            scores = self.task.evaluate(self.device)
        self.task.model.load_state_dict(trained)
        self.task.train()
        return scores

    def save(self, step: int) -> None:
        """Collect the state and write it as a checkpoint in the background.

        Under FSDP each rank writes its shards; the last checkpoint is unsharded.
        """
        if self.saved == step:
            return
        sharded = self.run.parallel == "fsdp" and distributed.active() and step < self.run.steps
        collect = parallel.local_shards if sharded else parallel.full_state
        tensors = {
            "model": collect(self.task.model.state_dict()),
            "ema": collect(self.ema.shadow),
            "optimizer": collect(_optimizer_tensors(self.optimizer)),
        }
        state = {
            "kind": self.task.kind,
            "step": step,
            "epoch": distributed.sum_counts(self.epoch),
            "recipe": dataclasses.asdict(self.recipe),
            "versions": _versions(),
        }
        if sharded or distributed.rank() == 0:
            self.saver.save(state, tensors, self.task.extra_files(), sharded)
        self.saved = step
        self.saved_at = time.monotonic()


def _without_seen(counts: Mapping[str, int]) -> dict[str, int]:
    return {reason: n for reason, n in counts.items() if reason != "seen"}


class _Guard:
    """Stops a run whose loss or gradient is not finite, before the optimizer step changes any weight.

    No step waits for a GPU: from the first non-finite step on, a flag on the device makes optimizer steps change
    nothing, and the run stops when the host next reads the flag. On a CPU it is read at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.halted = torch.zeros((), device=device)
        self.waits = device.type == "cpu"
        self.recent: list[tuple[int, Tensor, Tensor, list[str]]] = []

    def watch(self, step: int, loss: Tensor, norm: Tensor, keys: list[str]) -> Tensor:
        """Add a step -> 1 from the first non-finite one on, else 0: `found_inf` of AdamW's kernels."""
        # A non-finite loss on one rank reaches every rank through the averaged gradient: all stop at the same step.
        self.halted = torch.maximum(self.halted, (~torch.isfinite(norm)).to(self.halted))
        self.recent.append((step, loss, norm, keys))
        if self.waits:
            self.check()
        return self.halted

    def check(self) -> None:
        """Raises NonFiniteError on every rank, naming the first non-finite step since the last check."""
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
        self._samples = 0
        self._wait = 0.0
        self._count = 0
        self._sums: dict[str, Tensor] = {}
        self._began = time.perf_counter()

    def waiting(self) -> None:
        self._mark = time.perf_counter()

    def working(self) -> None:
        self._wait += time.perf_counter() - self._mark

    def add(self, samples: int, values: Mapping[str, Tensor]) -> None:
        self._samples += samples
        self._count += 1
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


def _versions() -> dict[str, str]:
    return {"clipkit": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat names: `<parameter number>.<quantity>`, numbered over all groups."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{k}": torch.as_tensor(v) for i, entry in state.items() for k, v in entry.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Iterable[tuple[str, Tensor]]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors:
        number, _, quantity = name.partition(".")
        parameter = parameters[int(number)]
        # In the parameter's own memory format: the fused kernel walks all of a parameter's tensors in one order.
        if tensor.shape == parameter.shape:
            tensor = torch.empty_like(parameter).copy_(parallel.shard_like(tensor, parameter))
        optimizer.state[parameter][quantity] = tensor
