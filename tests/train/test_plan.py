import dataclasses
import json

import pytest

from clipkit.config import load_recipe
from clipkit.data.loader import _Samples
from clipkit.errors import UsageError
from clipkit.train import plan as planning
from clipkit.train.losses import GATHERED
from clipkit.train.plan import DEVICES, plan
from clipkit.train.pretrain import PretrainRecipe

VIT = (
    "model.image_tower=vit_tiny_patch16_224",
    "model.image_size=224",
    "model.image_kwargs={}",
    "run.batch_size=1024",
    "data.shards=none",
)


def recipe(*words):
    return load_recipe(PretrainRecipe, "drawings_clip", [*VIT, *words])


def planned(*words, ranks=1, **more):
    return plan(recipe(*words), ranks, DEVICES["a100"], **more)


def test_operations_are_those_of_the_towers():
    """ViT-Ti/16 at 224: 1.08 GMAC forward by timm's own count (1.26 with attention products), so 6 and more a step."""
    found = planned(caption_tokens=3)
    assert 6 * 1.08e9 < found.flops_per_sample < 6 * 1.35e9
    assert planned(caption_tokens=24).flops_per_sample > found.flops_per_sample


def test_operations_are_those_of_the_pictures_that_training_sees():
    tower = ("model.image_tower=clipkit_resnet", "model.image_size=32", "model.image_kwargs={channels=[8], depths=[1]}")
    whole, early, text = (
        planned(*tower, *more) for more in ((), ("data.progressive_size=16",), ("model.image_size=2",))
    )
    share = (early.flops_per_sample - text.flops_per_sample) / (whole.flops_per_sample - text.flops_per_sample)
    assert share == pytest.approx(0.4 + 0.6 / 4, abs=0.02)  # three fifths of the steps at a quarter of the pixels
    assert early.activations_bytes == whole.activations_bytes


def test_a_step_is_as_fast_as_its_precision():
    """A100: 312 bf16 TFLOP/s against 19.5 in fp32; a V100 has no bf16 to be automatic about."""
    auto, fp32 = (planned(f"run.precision={asked}") for asked in ("auto", "fp32"))
    assert fp32.compute_s / auto.compute_s == pytest.approx(16)
    assert fp32.activations_bytes == pytest.approx(2 * auto.activations_bytes, abs=1)
    old = [plan(recipe(f"run.precision={asked}"), 1, DEVICES["v100"]) for asked in ("auto", "fp32")]
    assert old[0] == old[1]


def test_weights_are_counted_exactly():
    found = planned()
    assert found.trained_parameters == found.parameters
    assert found.weights_bytes == 5 * 4 * found.parameters
    assert planned("run.parallel=fsdp", ranks=8).weights_bytes == found.weights_bytes // 8


def test_a_locked_tower_is_looked_through_and_not_trained():
    whole, text, image = planned(), planned("finetune.lock=text"), planned("finetune.lock=image")
    for locked in (text, image):
        assert locked.parameters == whole.parameters
        assert locked.weights_bytes == 4 * (2 * locked.parameters + 3 * locked.trained_parameters)
        trained = locked.trained_parameters / whole.trained_parameters
        assert locked.optimizer_s / whole.optimizer_s == pytest.approx(trained)
    both = text.trained_parameters + image.trained_parameters
    assert both == whole.parameters + 1  # the logit scale is of neither tower
    # Of a locked tower a third is left, the forward pass.
    towers = whole.flops_per_sample - text.flops_per_sample, whole.flops_per_sample - image.flops_per_sample
    assert sum(towers) == pytest.approx(whole.flops_per_sample * 2 / 3, rel=0.02)
    assert text.activations_bytes + image.activations_bytes == pytest.approx(whole.activations_bytes, rel=0.05)


def test_parts_and_checkpoints_trade_time_for_memory():
    plain, parts = planned(), planned("run.micro_batches=4")
    kept = planned("model.grad_checkpointing=true")
    assert parts.activations_bytes == pytest.approx(plain.activations_bytes / 4, rel=0.01)
    assert kept.activations_bytes < plain.activations_bytes / 3
    assert parts.compute_s == pytest.approx(plain.compute_s * 4 / 3)
    assert kept.compute_s == pytest.approx(plain.compute_s * 1.3, rel=0.1)  # the blocks' forward pass, again


def test_ranks_share_the_work_and_pay_for_talking():
    alone, node, two = planned(), planned(ranks=8), planned(ranks=16)
    assert alone.gradients_s == alone.contrast_s == 0
    assert node.compute_s == pytest.approx(alone.compute_s / 8)
    assert two.contrast_s > 5 * node.contrast_s  # over the network now
    assert alone.samples_per_s < node.samples_per_s < two.samples_per_s


def test_features_that_are_too_many_to_gather_go_round_a_ring():
    width = 128  # drawings_clip's embed_dim
    small, large = (planned(f"run.batch_size={n}", ranks=8) for n in (GATHERED // 4 // width, GATHERED // 2 // width))
    assert small.contrast_s == small.contrast_gathered_s < small.contrast_ring_s
    assert large.contrast_s == large.contrast_ring_s > large.contrast_gathered_s
    assert large.loss_bytes < small.loss_bytes


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_rank_waits_for_its_samples_or_its_loaders_do_for_it(workers):
    without = planned(f"data.workers={workers}", ranks=2)
    slow, fast = without.step_s / 512 * 2.5, without.step_s / 512 * 0.5  # of 512 samples, for a rank
    found = [planned(f"data.workers={workers}", ranks=2, loading=seconds) for seconds in (slow, fast)]
    assert [plan.loading_s / without.step_s for plan in found] == pytest.approx([2.5, 0.5])
    assert [plan.workers_wanted for plan in found] == [3, 1]
    assert (without.loading_s, without.workers_wanted) == (None, None)
    steps = {0: [3.5, 1.5], 1: [2.5, 1.0], 4: [1.0, 1.0]}[workers]
    assert [plan.step_s / without.step_s for plan in found] == pytest.approx(steps)
    assert [plan.samples_per_s * plan.step_s for plan in found] == pytest.approx([1024, 1024])


def test_loading_is_timed_on_the_pictures_that_training_sees(packs, monkeypatch):
    sizes, clock = [], iter(range(1000))
    monkeypatch.setattr(planning.time, "perf_counter", lambda: next(clock))  # every batch takes a second
    batches = _Samples.__getitems__
    monkeypatch.setattr(_Samples, "__getitems__", lambda *a: sizes.append(batches(*a).images.shape) or batches(*a))
    found = recipe(f"data.shards={packs / 'train'}", "model.image_size=32", "data.progressive_size=24")
    assert planning.loading_time(found, samples=8) == pytest.approx(1 / 8)
    assert sizes == [(8, 3, 24, 24)] * 3 + [(8, 3, 32, 32)] * 3


def test_packs_that_are_not_here_are_not_timed(packs, tmp_path):
    missing = f"data.shards={tmp_path}"
    for words in (missing, "data.shards=http://127.0.0.1:9/pack", f'data.mix={{"{tmp_path}" = 0.5}}'):
        assert planning.loading_time(recipe(f"data.shards={packs / 'train'}", words)) is None


def test_ranks_must_divide_the_batch():
    with pytest.raises(UsageError, match="does not divide over 3 ranks"):
        planned(ranks=3)


def test_the_command(command, packs):
    words = ("plan", "drawings_clip", f"data.shards={packs / 'train'}", "--gpus", "4", "--gpu", "h100", "--json")
    code, out, _ = command(*words)
    assert code == 0
    assert json.loads(out).keys() == {f.name for f in dataclasses.fields(planned())}
    assert json.loads(out)["loading_s"] > 0
    code, out, _ = command("plan", "drawings_clip", "data.shards=nowhere")
    assert "samples_per_s" in out
    assert "loading_s           not known: cannot be read here: nowhere" in out
    code, _, err = command("plan", "drawings_clip", "--gpu", "h10")
    assert (code, err.strip()) == (2, "clipkit: unknown GPU 'h10'; did you mean 'h100'?")
