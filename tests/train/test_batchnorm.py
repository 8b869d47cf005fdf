"""BatchNorm over ranks is that of one process with the whole batch, and each sample is counted once."""

import copy
import dataclasses
import shutil
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy_distributions import TINY

from clipkit import distributed
from clipkit.config import RunConfig, load_recipe
from clipkit.data.loader import Stream
from clipkit.data.shards import Shards
from clipkit.train import batchnorm, noisy_classifier, noisy_clip, parallel, pretrain
from clipkit.train.noisy_classifier import Classification, ClassifierRecipe
from clipkit.train.noisy_clip import NoisyCLIPRecipe, NoisyPretraining
from clipkit.train.pretrain import Pretraining, PretrainRecipe
from clipkit.train.step import backward

TOWERS = {
    "small": ("clipkit_resnet", "{channels=[6, 8], depths=[1, 1]}"),
    "pooled": ("clipkit_resnet9", "{channels=[4, 6, 8], depths=[1, 1]}"),
    "timm": ("resnet18", "{channels=[4, 8, 8, 16], layers=[1, 1, 1, 1], stem_width=4}"),
    "timm, norm and activation in one": ("lcnet_035", "{}"),
}
SMALL = ("model.embed_dim=8", "model.text_width=16", "model.text_heads=2", "model.text_layers=1")


def spread(values, bounds):
    """This rank's rows."""
    return values[bounds[distributed.rank()] : bounds[distributed.rank() + 1]]


def statistics(module):
    return {n: b.clone() for n, b in module.named_buffers() if "running" in n or "tracked" in n}


# The function itself

SHAPES = {"images": (9, 3, 4, 5), "vectors": (9, 3), "sequences": (9, 3, 7), "one sample a rank": (2, 3)}
SHAPES["a rank without samples"] = (5, 3, 4, 5)


def _inputs(shape, dtype):
    generator = torch.Generator().manual_seed(1)
    x, gradient = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x = 3 + x * torch.tensor([1e-3, 1.0, 50.0]).view(1, 3, *[1] * (len(shape) - 2))
    weight, bias = torch.tensor([1.5, -0.3, 0.0]), torch.tensor([0.1, 2.0, -1.0])
    return tuple(t.to(dtype) for t in (x, gradient, weight, bias))


def _bounds(rows, ranks):
    return [0, 2, 3, rows] if ranks == 3 else [0, rows // 3 or 1, rows]


def _normalised(ranks, dtype):
    found = {}
    for name, shape in SHAPES.items():
        if ranks == 3 and shape[0] < 3:
            continue
        bounds = _bounds(shape[0], ranks)
        if name == "a rank without samples":
            bounds = [0, 2, 2, 5] if ranks == 3 else [0, 5, 5]
        x, gradient, weight, bias = _inputs(shape, dtype)
        x = spread(x, bounds).clone().requires_grad_()
        weight.requires_grad_(), bias.requires_grad_()
        running = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
        out = batchnorm.batch_norm(x, *running, weight, bias, training=True, momentum=0.3)
        out.backward(spread(gradient, bounds))
        found[name] = [t.detach() for t in (out, x.grad, weight.grad, bias.grad, *running)]
    return found


EXACT = {torch.float64: 1e-9, torch.float32: 2e-4}


def _functions(ranks):
    return {str(dtype): _normalised(ranks, dtype) for dtype in EXACT}


def check_functions(results):
    for dtype, exact in EXACT.items():
        for name in results[0][str(dtype)]:
            x, gradient, weight, bias = _inputs(SHAPES[name], torch.float64)
            x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()
            running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
            out = F.batch_norm(x, *running, weight, bias, training=True, momentum=0.3)
            out.backward(gradient)
            parts = list(zip(*(r[str(dtype)][name] for r in results), strict=True))
            whole = [torch.cat(parts[0]), torch.cat(parts[1]), sum(parts[2]), sum(parts[3]), parts[4][0], parts[5][0]]
            for ours, expected in zip(whole, (out, x.grad, weight.grad, bias.grad, *running), strict=True):
                scale = float(expected.detach().abs().max())
                torch.testing.assert_close(ours.double(), expected.detach(), rtol=exact, atol=exact * scale, msg=name)
            assert all(torch.equal(parts[k][0], other) for k in (4, 5) for other in parts[k][1:])


def test_values_gradients_and_statistics_are_those_of_the_whole_batch(two_ranks):
    """Ranks with unequal shares, a channel whose mean is 3,000 times its deviation, one without a gain."""
    check_functions([rank["functions"] for rank in two_ranks])


@pytest.mark.slow
def test_on_three_ranks_too():
    check_functions(on_ranks(3, _functions, 3))


def _autocast():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4).to(memory_format=torch.channels_last)
    batchnorm.synchronise(norm)
    x = torch.randn(6, 4, 5, 5, dtype=torch.bfloat16)[distributed.rank() * 3 :][:3]
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    out.float().square().sum().backward()
    assert out.is_contiguous(memory_format=torch.channels_last)
    return out.detach(), x.grad, norm.running_var


def test_bf16_keeps_its_type_and_layout_and_float32_statistics(two_ranks):
    results = [rank["autocast"] for rank in two_ranks]
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    x = torch.randn(6, 4, 5, 5, dtype=torch.bfloat16).float().requires_grad_()
    out = norm(x)
    out.square().sum().backward()
    for k, expected in ((0, out), (1, x.grad)):
        assert results[0][k].dtype == torch.bfloat16
        torch.testing.assert_close(torch.cat([r[k] for r in results]).float(), expected.detach(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(results[0][2], norm.running_var)
    assert results[0][2].dtype == torch.float32


class _Kinds(nn.Module):
    """BatchNorms as they come: plain, with an activation, without gains, on cumulative averages, frozen."""

    def __init__(self):
        super().__init__()
        plain, act = nn.BatchNorm2d(3), BatchNormAct2d(3)
        bare, frozen = nn.BatchNorm2d(3, affine=False, momentum=None), nn.BatchNorm2d(3)
        self.layers = nn.Sequential(plain, act, nn.Flatten(2), nn.BatchNorm1d(3), nn.Unflatten(2, (4, 4)), bare, frozen)
        frozen.eval()

    def forward(self, x):
        return self.layers(x)


def _kinds(passes):
    module = _Kinds()
    module.layers[-1].eval()
    batchnorm.synchronise(module)
    assert not any("forward" in name for name in module.state_dict())
    twin = copy.deepcopy(module)
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    outs = [module(spread(x + k, [0, 2, 6])) for k in range(passes)]
    twin(spread(x, [0, 2, 6]))
    assert not torch.equal(twin.layers[0].running_mean, torch.zeros(3))
    kept = statistics(module)
    module.eval()
    return outs[-1].detach(), kept, module(x).detach()


def test_every_kind_of_batchnorm_is_synchronised_in_training_and_plain_in_evaluation(two_ranks):
    results = [rank["kinds"] for rank in two_ranks]
    module = _Kinds()
    module.layers[-1].eval()
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    outs = [module(x + k) for k in range(3)]
    torch.testing.assert_close(torch.cat([r[0] for r in results]), outs[-1].detach(), rtol=1e-4, atol=1e-5)
    for name, value in statistics(module).items():
        torch.testing.assert_close(results[0][1][name], value, rtol=1e-4, atol=1e-5)
    module.eval()
    torch.testing.assert_close(results[1][2], module(x).detach(), rtol=1e-4, atol=1e-5)


# Whole tasks


def tower(name, packs, out, *words):
    kind, arguments = TOWERS[name]
    trunk = [f"model.image_tower={kind}", f"model.image_kwargs={arguments}"]
    return [*TINY, *SMALL, *trunk, f"data.shards={packs / 'train'}", "data.val=", f"run.out={out}", *words]


def shaken(task):
    """With no gain at zero: a gain that is hides what is behind it."""
    generator = torch.Generator().manual_seed(3)
    for parameter in task.model.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return task.train()


def of_clip(name, packs, out, *words):
    recipe = load_recipe(PretrainRecipe, "drawings_clip", tower(name, packs, out, *words))
    torch.manual_seed(0)
    shards = Shards(recipe.data.shards)
    task = Pretraining(recipe, shards)
    return shaken(task).double(), next(Stream(shards, recipe.data, task.image_size, 11, 0).batches(0, 1))


def of_noisy(kind, packs, clip):
    """A noise-aware task with no noise that depends on how the batch is cut."""
    module, recipe_kind = {
        "noisy_clip": (noisy_clip, NoisyCLIPRecipe),
        "noisy_classifier": (noisy_classifier, ClassifierRecipe),
    }[kind]
    module.sample_log_snr = lambda schedule, n: torch.zeros(n)
    module.noised = lambda x0, lam, noise, clean: (x0 * 0.7, lam)
    words = [f"data.shards={packs / 'train'}", "run.out=nowhere", f"model.clip={clip}", "data.workers=0"]
    recipe = load_recipe(recipe_kind, f"drawings_{kind}", words)
    torch.manual_seed(0)
    shards = Shards(recipe.data.shards)
    task = (NoisyPretraining if kind == "noisy_clip" else Classification)(recipe, shards)
    shaken(task)
    tower = task.model.clip if kind == "noisy_clip" else task.model.tower.clip
    tower.image.double()  # at a bend of a ReLU, float32's rounding is no small thing
    return task, next(Stream(shards, recipe.data, task.image_size, 11, 0).batches(0, 1))


def gradients(task, batch, micro_batches=1, module=None):
    torch.manual_seed(1)
    loss, _ = backward(task, batch, micro_batches, module)
    found = {n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None}
    return {"loss": loss, **found}, statistics(task.model)


def _on_rank(make, arguments, micro_batches, how):
    task, batch = make(*arguments)
    batch = dataclasses.replace(
        batch,
        **{name: spread(getattr(batch, name), BOUNDS) for name in ("images", "captions", "groups", "keys")},
    )
    batchnorm.synchronise(task)
    module = parallel.wrap(task, how, torch.device("cpu"))
    torch.manual_seed(1)
    loss, _ = backward(task, batch, micro_batches, module)
    parallel.finish_gradients(task.parameters(), 0.0)
    found = {n: p.grad for n, p in task.model.named_parameters() if p.grad is not None}
    if how == "fsdp":
        found = parallel.full_state(found)
    return {"loss": loss, **found}, statistics(task.model)


def same(ours, expected, rtol=1e-5):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            ours[name].double(), value.double(), rtol=rtol, atol=rtol * float(value.abs().max()) + 1e-9, msg=name
        )


BOUNDS, PARTS = (0, 4, 11), 6


def _tasks(packs, out, clip):
    """Name -> what makes the task, and its arguments."""
    locked = (f"finetune.init_from={clip}", "finetune.init=both", "finetune.lock=image", "finetune.unlock_blocks=1")
    return {
        **{name: (of_clip, name, packs, out) for name in TOWERS},
        "student": (of_clip, "pooled", packs, out, f'distil.teachers=["{clip}"]'),
        "locked": (of_clip, "small", packs, out, *locked),
        "noisy_clip": (of_noisy, "noisy_clip", packs, clip),
        "noisy_classifier": (of_noisy, "noisy_classifier", packs, clip),
    }


def _on_two_ranks(packs, out, clip):
    """Everything that this file wants of two ranks: they take long to start."""
    tasks = _tasks(packs, out, clip)
    found = {name: _on_rank(make, rest, 1, "ddp") for name, (make, *rest) in tasks.items()}
    return {
        **found,
        "pieces": _on_rank(tasks["timm"][0], tasks["timm"][1:], 1, "fsdp"),
        "parts": _on_rank(tasks["small"][0], tasks["small"][1:], PARTS, "ddp"),
        "functions": _functions(2),
        "autocast": _autocast(),
        "kinds": _kinds(3),
    }


@pytest.fixture(scope="module")
def clip(packs, tmp_path_factory):
    out = tmp_path_factory.mktemp("clip")
    pretrain.run("drawings_clip", tower("small", packs, out, "run.steps=1"))
    return out


@pytest.fixture(scope="module")
def two_ranks(packs, clip, tmp_path_factory):
    return on_ranks(2, _on_two_ranks, packs, tmp_path_factory.mktemp("two"), clip)


@pytest.mark.parametrize("name", [*TOWERS, "student", "locked", "noisy_clip", "noisy_classifier", "pieces"])
def test_two_unequal_ranks_have_the_gradient_and_statistics_of_one(packs, tmp_path, clip, two_ranks, name, monkeypatch):
    for module in (noisy_clip, noisy_classifier):  # of_noisy replaces them
        monkeypatch.setattr(module, "sample_log_snr", module.sample_log_snr)
        monkeypatch.setattr(module, "noised", module.noised)
    make, *rest = _tasks(packs, tmp_path, clip)["timm" if name == "pieces" else name]
    task, batch = make(*rest)
    before = statistics(task.model)
    expected, kept = gradients(task, batch)
    value = expected.pop("loss")
    losses = torch.stack([rank[name][0]["loss"] for rank in two_ranks])
    torch.testing.assert_close(losses.mean(), value)
    for rank in two_ranks[:1] if name == "pieces" else two_ranks:
        exact = 1e-4 if name.startswith("noisy") else 1e-5
        same({n: g for n, g in rank[name][0].items() if n != "loss"}, expected, exact)
        same(rank[name][1], kept, exact)
    resting = [n for n in kept if torch.equal(kept[n], before[n])]
    assert len(resting) < len(kept)
    assert all(name == "locked" and not n.startswith("image.trunk.stages.1") for n in resting)


def test_a_teacher_rests(packs, tmp_path, clip):
    make, *rest = _tasks(packs, tmp_path, clip)["student"]
    task, batch = make(*rest)
    teacher = task.teachers.clips[0].model
    before = statistics(teacher)
    gradients(task, batch)
    assert not any(m.training for m in teacher.modules())
    same(statistics(teacher), before, rtol=0)


# Micro-batches


@pytest.mark.parametrize("name", ["small", "timm"])
def test_statistics_move_once_per_micro_batch(packs, tmp_path, name):
    """As by one pass over the parts, though GradCache makes two; the gradient is that of the parts' features."""
    task, batch = of_clip(name, packs, tmp_path)
    ours, kept = gradients(task, batch, 3)
    again, _ = of_clip(name, packs, tmp_path)
    features = [torch.cat(column) for column in zip(*(again(part) for part in batch.split(3)), strict=True)]
    loss, _ = again.loss(tuple(features), batch)
    loss.backward()
    same(ours, {"loss": loss.detach(), **{n: p.grad for n, p in again.model.named_parameters()}})
    same(kept, statistics(again.model), rtol=1e-9)
    assert int(kept["image.trunk.bn1.num_batches_tracked"] if name == "timm" else 3) == 3


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradient_checkpointing_does_not_count_twice(packs, tmp_path, micro_batches):
    plain, checkpointed = (
        gradients(*of_clip("timm", packs, tmp_path, f"model.grad_checkpointing={on}"), micro_batches)
        for on in ("false", "true")
    )
    same(checkpointed[0], plain[0])
    same(checkpointed[1], plain[1], rtol=1e-9)


def test_micro_batches_on_ranks_are_normalised_over_the_ranks(packs, tmp_path, two_ranks):
    """Part k of every rank together; with four samples against seven, the smaller rank decides that four are made."""
    task, batch = of_clip("small", packs, tmp_path)
    cuts = [[BOUNDS[r] + (BOUNDS[r + 1] - BOUNDS[r]) * i // 4 for i in range(5)] for r in range(2)]
    rows = [[i for cut in cuts for i in range(cut[k], cut[k + 1])] for k in range(4)]
    order = torch.tensor(list(chain.from_iterable(rows))).argsort()
    features = []
    for part in rows:
        captions, keys = [batch.captions[i] for i in part], [batch.keys[i] for i in part]
        images, groups = batch.images[part], batch.groups[part]
        features.append(task(dataclasses.replace(batch, images=images, captions=captions, groups=groups, keys=keys)))
    loss, _ = task.loss(tuple(torch.cat(column)[order] for column in zip(*features, strict=True)), batch)
    loss.backward()
    expected = {n: p.grad for n, p in task.model.named_parameters()}
    for rank in two_ranks:
        ours, kept = rank["parts"]
        same({n: g for n, g in ours.items() if n != "loss"}, expected)
        same(kept, statistics(task.model))


def test_passes_that_do_not_count_leave_everything_as_it_was():
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=None))
    module(torch.randn(5, 3))
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with batchnorm.keep_running_stats(module), torch.no_grad():
        module(torch.full((4, 3), float("nan")))
    assert all(torch.equal(before[n], t) for n, t in module.state_dict().items())
    x = torch.randn(5, 3, requires_grad=True)
    out = checkpoint(module, x, use_reentrant=False).square().sum()
    once = {n: t.clone() for n, t in module.state_dict().items()}
    with batchnorm.keep_running_stats(module):
        out.backward()
    assert all(torch.equal(once[n], t) for n, t in module.state_dict().items())
    assert not torch.equal(once["0.running_mean"], before["0.running_mean"])


# What a run says


@pytest.mark.parametrize(
    ("micro_batches", "synchronised", "ranks", "lines"),
    [
        (1, True, 1, []),
        (1, False, 1, []),
        (1, True, 2, []),
        (2, True, 1, ["gradients are exact for statistics of each micro-batch, not of the whole batch"]),
        (1, False, 2, ["gradients are exact for statistics of each rank, not of the batch of all ranks"]),
        (4, False, 2, ["each micro-batch by itself", "run.sync_batchnorm=false"]),
    ],
)
def test_where_equality_ends_a_line_says_so(monkeypatch, micro_batches, synchronised, ranks, lines):
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    run = RunConfig("out", 1, micro_batches=micro_batches, sync_batchnorm=synchronised)
    found = batchnorm.limits(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), run)
    assert len(found) == len(lines)
    assert all(part in line and "\n" not in line for part, line in zip(lines, found, strict=True))
    assert not batchnorm.limits(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), run)
    assert not batchnorm.limits(nn.Sequential(nn.BatchNorm1d(2)).eval(), run)


def test_a_run_says_it_once(packs, tmp_path, capsys):
    pretrain.run("drawings_clip", tower("small", packs, tmp_path / "a", "run.steps=2", "run.micro_batches=2"))
    assert capsys.readouterr().err.count("BatchNorm normalises each micro-batch by itself") == 1
    pretrain.run("drawings_clip", tower("small", packs, tmp_path / "b", "run.steps=1"))
    assert "BatchNorm" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # of Python 3.13.0 alone
def test_a_compiled_tower_is_synchronised_too():
    results = on_ranks(2, _compiled)
    for eager, compiled in results:
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def _compiled():
    torch.manual_seed(0)
    eager = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    compiled = copy.deepcopy(eager)
    found = []
    x = torch.randn(6, 3, 8, 8)[distributed.rank() * 3 :][:3]
    for module in (eager, compiled):
        batchnorm.synchronise(module)
    compiled.compile(dynamic=False)
    for module in (eager, compiled):
        module(x).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in module.parameters()] + [module[1].running_var]))
    return found
