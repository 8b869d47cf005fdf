"""Pieces of a model on each rank: the run is that of whole copies, and what it leaves behind is a plain checkpoint."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from ranks import on_ranks

from clipkit import checkpoint, distributed, load, log
from clipkit.train import parallel, pretrain

FSDP = "run.parallel=fsdp"


def words(packs, out):
    small = ["run.batch_size=16", "run.log_every=1", "run.save_every=2", "run.steps=4", "run.precision=fp32"]
    return [*small, "optim.warmup=2", "data.workers=0", "data.val=", f"data.shards={packs / 'train'}", f"run.out={out}"]


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(*arguments):
    return subprocess.run([*LAUNCH, "-m", "clipkit", *arguments], capture_output=True, text=True, env=ENVIRONMENT)


def losses(run):
    return [line["loss"] for line in log.read(run / "log.jsonl") if "loss" in line]


def test_a_run_in_pieces_is_a_run(packs, tmp_path):
    """Four steps under FSDP, the last two again from their sharded checkpoint on one process: the same curve."""
    pretrain.run("drawings_clip", words(packs, tmp_path / "whole"))
    expected = pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    done = torchrun("pretrain", "drawings_clip", *words(packs, tmp_path / "cut"), FSDP)
    assert done.returncode == 0, done.stderr
    assert "returned a view" not in done.stderr  # torch 2.15 warns of it at each step
    assert losses(tmp_path / "cut") == expected
    shapes = {n: t.shape for n, t in load(tmp_path / "whole").model.state_dict().items()}
    assert {n: t.shape for n, t in load(tmp_path / "cut").model.state_dict().items()} == shapes
    last = checkpoint.latest(tmp_path / "cut").path
    assert (last / "model.safetensors").is_file()  # the last one is unsharded, the one before sharded
    shutil.rmtree(last)
    assert (checkpoint.latest(tmp_path / "cut").path / "model-00002-of-00002.safetensors").is_file()
    assert {n: t.shape for n, t in load(tmp_path / "cut").model.state_dict().items()} == shapes
    pretrain.run("drawings_clip", words(packs, tmp_path / "cut"))
    assert losses(tmp_path / "cut") == expected


def test_what_cannot_be_cut_says_so(packs, tmp_path):
    done = torchrun("denoiser", "drawings_denoiser", *words(packs, tmp_path), FSDP)
    assert "a denoiser has no FSDP units, so that run.parallel=fsdp cannot shard it" in done.stderr
    done = torchrun("pretrain", "drawings_clip", *words(packs, tmp_path), FSDP, "optim.method=muon")
    assert "muon needs whole matrices" in done.stderr


def _clipped(max_norms):
    return [_clipped_to(max_norm) for max_norm in max_norms]


def _clipped_to(max_norm):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    cut = torch.nn.Parameter(distribute_tensor(torch.zeros(5, 2), mesh, [Shard(0)]))
    cut.grad = distribute_tensor(torch.arange(10.0).view(5, 2), mesh, [Shard(0)])
    scalar = torch.nn.Parameter(torch.zeros(()))
    scalar.grad = torch.tensor(3.0 + distributed.rank())  # 3 and 4: their mean counts
    norm = parallel.finish_gradients([cut, scalar], max_norm)
    return norm, parallel.full_state({"cut": cut.grad}), scalar.grad


def test_the_norm_is_that_of_the_whole_gradient():
    max_norms = (1.0, 1e6, 0.0)
    matrix, scalar = torch.arange(10.0).view(5, 2), torch.tensor(3.5)
    expected = (matrix.square().sum() + scalar.square()).sqrt()
    for max_norm, *results in zip(max_norms, *on_ranks(2, _clipped, max_norms), strict=True):
        factor = min(1.0, max_norm / float(expected)) if max_norm else 1.0
        torch.testing.assert_close(results[0][1]["cut"], matrix * factor)
        for norm, _, alone in results:
            torch.testing.assert_close(norm, expected)
            torch.testing.assert_close(alone, scalar * factor)


def _put_together(rows):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (distributed.world_size(),))
    tensors = {str(n): distribute_tensor(torch.arange(3.0 * n).view(n, 3), mesh, [Shard(0)]) for n in rows}
    with CommDebugMode() as collectives:
        found = parallel.full_state({**tensors, "alone": torch.tensor(5)})
    return found, [str(name) for name in collectives.get_comm_counts()]


def test_pieces_are_put_together_on_the_first_rank():
    """Also where ranks have fewer rows, or none; and not by DTensor's collective, which breaks gloo's heap."""
    (first, collectives), *others = on_ranks(3, _put_together, [1, 2, 3, 7, 9])
    assert sorted(first) == ["1", "2", "3", "7", "9", "alone"]
    for n in (1, 2, 3, 7, 9):
        assert torch.equal(first[str(n)], torch.arange(3.0 * n).view(n, 3))
    assert not any(found for found, _ in others)
    assert collectives
    assert not any("functional" in name for name in collectives), collectives
