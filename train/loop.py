"""The one training loop: pretraining, denoisers and noise-aware CLIPs all go through `train`.

A run is a folder. Each step's randomness is a function of (seed, step, rank), so the state of a run is its weights, its
optimizer and its step: the same command resumes, and on a CPU ends with the bits of an uninterrupted run. It saves by
steps, by time, and when it is told to stop.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import platform
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from clipkit import checkpoint, distributed
from clipkit._version import __version__
from clipkit.async_checkpoint import Saver, lock
from clipkit.config import Recipe
from clipkit.data.loader import Batch, Stream
from clipkit.errors import CheckpointError, NonFiniteError, StoppedError, UsageError
from clipkit.log import Records, say
from clipkit.malloc import keep_pages
from clipkit.models.pretrained import TRAINED_WITH
from clipkit.train import batchnorm, optim, parallel
from clipkit.train.step import backward
from clipkit.train.task import Task


def precision_of(device: torch.device, asked: str) -> Literal["fp32", "bf16"]:
    """bf16 where asked for, or where "auto" finds the hardware."""
    return "bf16" if asked == "bf16" or (asked == "auto" and distributed.computes_in_bf16(device.type)) else "fp32"


def autocast(device: torch.device, asked: str) -> AbstractContextManager[Any]:
    """The context in which the networks are called."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision_of(device, asked) == "bf16")


def seed_everything(seed: int, step: int, rank: int) -> None:
    """Make what follows a function of these three numbers."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + rank) % 2**64)  # both factors are odd: seeds stay apart


def train(task: Task, stream: Stream, recipe: Recipe, device: torch.device) -> Path:
    """Train `task` on `stream` as the recipe says, resuming what lies in its `run.out` -> that folder.

    Ends early, saved, at SIGTERM and SIGHUP (StoppedError) and Ctrl-C (KeyboardInterrupt). Raises CheckpointError if
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
    """State of one run, and its steps."""

    def __init__(self, task: Task, recipe: Recipe, device: torch.device) -> None:
        self.task, self.recipe, self.device = task, recipe, device
        self.run, self.config = run, config = recipe.run, recipe.optim
        if run.sync_batchnorm and distributed.world_size() > 1:
            batchnorm.synchronise(task)
        if run.compile:
            for network in task.compile_targets():
                network.compile(dynamic=False)
        self.parallel = parallel.share(task, run.parallel, device)
        self.optimizer = optim.make_optimizer(task.model, config, task.lr_scales())
        self.ema = optim.EMA(task.model, run.ema_decay)
        self.guard = _Guard(device)
        self.saver = Saver(Path(run.out), run.keep_last, run.keep_every)
        self.saved, self.saved_at = 0, time.monotonic()
        self.epoch: Counter[str] = Counter()  # samples seen in it, and skipped by reason; rank 0 has what was resumed

    def resume(self, folder: Path) -> int:
        """Load the newest checkpoint of the run -> steps already done."""
        folder.mkdir(parents=True, exist_ok=True)
        found = checkpoint.latest(folder)
        if found is None:
            return 0
        if found.state.get("kind") != self.task.kind:
            raise CheckpointError(
                f"{folder} holds a run of another kind ({found.state.get('kind')} there, {self.task.kind} here); "
                "give run.out another folder"
            )
        news = _same_recipe(found, self.recipe)
        _same_models(found, self.task.extra_files())
        if batchnorm.over_ranks(self.task) and found.state["recipe"]["run"].get("sync_batchnorm") is not True:
            news.append(f"run.sync_batchnorm: from step {found.step} on BatchNorm takes its statistics over all ranks")
        if distributed.rank() == 0:
            for line in news:
                say(line)
        for there, here in (("model", self.task.model.state_dict()), ("ema", self.ema.shadow)):
            for name, tensor in found.stream(there):
                here[name].copy_(parallel.like(tensor, here[name]))
        _load_optimizer(self.optimizer, found.stream("optimizer"))
        if distributed.rank() == 0:
            self.epoch.update(found.state.get("epoch", {}))
        self.saved = found.step
        return found.step

    def steps(self, stream: Stream, start: int, records: Records) -> None:
        """Run from step `start` to the end, logging, evaluating and saving when due."""
        run, meter = self.run, _Meter(self.device)
        batches, step = stream.batches(start, run.steps), start
        with _Interruption() as interruption:
            try:
                for step in range(start, run.steps):
                    self.meet(step, interruption)
                    meter.waiting()
                    batch = next(batches)
                    meter.working()
                    values = self.step(step, batch)
                    meter.add(len(batch.captions) * distributed.world_size(), values)
                    self.epoch.update({"seen": len(batch) + batch.skipped.total(), **batch.skipped})
                    records.bar.update(1)
                    self.record(stream, step + 1, meter, records)
                next(batches, None)  # the last word on the shards' hashes
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

    def meet(self, step: int, interruption: _Interruption) -> None:
        """Before a step, agree with the other ranks on whether to save or stop."""
        overdue = distributed.rank() == 0 and time.monotonic() - self.saved_at > 60 * self.run.save_minutes
        stop = 1 + interruption.signal if interruption.signal else 0
        wish = distributed.meet(max(int(overdue), stop))
        if wish:
            self.guard.check()
            self.save(step)
        if wish > 1:
            self.saver.wait()
            interruption.obey(wish - 1, step)

    def record(self, stream: Stream, done: int, meter: _Meter, records: Records) -> None:
        """After a step: log line, end of the epoch, evaluation, checkpoint."""
        run, last = self.run, done == self.run.steps
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
        """Scores of the averaged weights; the trained ones come back afterwards."""
        trained = copy.deepcopy(self.task.model.state_dict())
        self.task.model.load_state_dict(self.ema.shadow)
        self.task.eval()
        with torch.no_grad(), autocast(self.device, self.run.precision):
            scores = self.task.evaluate(self.device)
        self.task.model.load_state_dict(trained)
        self.task.train()
        return scores

    def save(self, step: int) -> None:
        """Put the state together, and write it as a checkpoint while the run goes on.

        Ranks that hold pieces write their own, but for the last checkpoint, which is made whole.
        """
        if self.saved == step:
            return
        in_parts = self.run.parallel == "fsdp" and distributed.active() and step < self.run.steps
        collect = parallel.shares if in_parts else parallel.whole
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
        if in_parts or distributed.rank() == 0:
            self.saver.save(state, tensors, self.task.extra_files(), in_parts)
        self.saved, self.saved_at = step, time.monotonic()


def _without_seen(counts: Mapping[str, int]) -> dict[str, int]:
    return {reason: n for reason, n in counts.items() if reason != "seen"}


class _Interruption:
    """SIGTERM, Ctrl-C and the terminal's end while it is entered: noted, so that the run saves first.

    A second Ctrl-C does not wait; under nohup the terminal's end is nothing.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._before: dict[int, Any] = {}
        self._terminals = [number for number in (1, 2) if os.isatty(number)]

    def __enter__(self) -> _Interruption:
        if threading.current_thread() is threading.main_thread():  # Python hears signals nowhere else
            numbers = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                numbers.append(signal.SIGHUP)
            self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGHUP:  # what is written to a terminal that is gone fails
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for terminal in self._terminals:
                os.dup2(nowhere, terminal)
            os.close(nowhere)
        self.signal = number

    @staticmethod
    def obey(number: int, step: int) -> NoReturn:
        """End as the signal asks."""
        done = f"saved at step {step}; the same command resumes" if step else "no step was done, nothing is saved"
        if number == signal.SIGINT:
            if distributed.rank() == 0:
                say(done)
            raise KeyboardInterrupt
        raise StoppedError(f"stopped by {signal.Signals(number).name}, {done}")


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
            tensor = torch.empty_like(parameter).copy_(parallel.like(tensor, parameter))
        optimizer.state[parameter][quantity] = tensor


_FREE_TO_CHANGE = {"data.workers", "data.cache", "data.cache_gb"} | {
    f"run.{key}"
    for key in (
        *("out", "device", "log_every", "save_every", "save_minutes", "keep_last", "keep_every", "eval_every"),
        *("tensorboard", "parallel", "timeout_minutes", "sync_batchnorm", "steps"),
    )
}


def _flat(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """{"section.key": value}; a section that is not there has no keys."""
    return {f"{section}.{key}": v for section, values in recipe.items() for key, v in (values or {}).items()}


def _filled(stored: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """A stored recipe or section with the defaults of keys that are younger than the run.

    It is compared with today's, not used, and so not checked: today's bounds need not hold for it.
    """
    found = dict(stored)
    for field in dataclasses.fields(config):
        ours = getattr(config, field.name)
        if isinstance(stored.get(field.name), Mapping) and dataclasses.is_dataclass(ours):
            found[field.name] = _filled(stored[field.name], ours)
        elif field.name not in stored and field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.name not in stored and field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
            found[field.name] = _filled({}, value) if dataclasses.is_dataclass(value) else value
        elif field.name not in stored and dataclasses.is_dataclass(ours):
            found[field.name] = _filled({}, ours)
    return found


def _same_recipe(found: checkpoint.Checkpoint, recipe: Recipe) -> list[str]:
    """Refuse to resume a run with a recipe that would have trained something else -> lines on what is new from here.

    A run may be of another length, as long as that has not been reached: what depends on `run.steps` (the learning
    rate, early_size) is from here on that of the new length. Raises CheckpointError.
    """
    ours = _flat(json.loads(json.dumps(dataclasses.asdict(recipe))))
    theirs = _flat(json.loads(json.dumps(_filled(found.state["recipe"], recipe))))
    keys = [key for key in {**theirs, **ours} if key not in _FREE_TO_CHANGE]
    changed = [
        f"{key}: {_show(theirs.get(key))} there, {_show(ours.get(key))} here"
        for key in keys
        if theirs.get(key) != ours.get(key)
    ]
    run = found.path.parent.parent
    if changed:
        hint = f"; to fine-tune from it, finetune.init_from={run} and a new run.out"
        raise CheckpointError(
            f"{run} holds a run of another recipe ({'; '.join(changed)}); give run.out another folder, or the recipe "
            f"its old values{hint if 'finetune.init_from' in ours else ''}"
        )
    steps, before = recipe.run.steps, theirs["run.steps"]
    if steps == before:
        return []
    if steps <= found.step:
        raise CheckpointError(
            f"{run} has done {found.step} of {before} steps; run.steps={steps} must be more than it has done"
        )
    return [f"run.steps: {before} there, {steps} here; from step {found.step} on the schedule is that of {steps} steps"]


def _same_models(found: checkpoint.Checkpoint, texts: Mapping[str, str]) -> None:
    """Refuse to resume with other models than the run was trained with so far. Raises CheckpointError."""
    there, here = (json.loads(text) for text in (found.text(TRAINED_WITH, "{}"), texts.get(TRAINED_WITH, "{}")))
    for key in here:
        if there.get(key, here[key]) != here[key]:
            section, name = key.split(".")
            raise CheckpointError(
                f"{found.path.parent.parent} was trained with another {key}: {found.state['recipe'][section][name]} "
                f"has changed since ({there[key]} then, {here[key]} now); put it back, or give run.out another folder"
            )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
