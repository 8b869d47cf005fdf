"""One rank dies, hangs, or meets a NaN: rows 7 to 9 of docs/reliability.md."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import held
import pytest
import torch
from process_faults import children, ended, is_pending, launched, same, state, tiny, until
from ranks import on_ranks

from clipkit import checkpoint, distributed
from clipkit.errors import NonFiniteError

STEPS = 40
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# torchrun kills what has not ended half a minute after it was told to, unless it is told otherwise.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"}


def torchrun(err, words, stop=0, restarts=0):
    """`clipkit pretrain` on two ranks; rank 0, which writes the log, stops itself when that has reached step `stop`."""
    clipkit = [held.__file__, held.words([(stop, signal.SIGSTOP)])] if stop else ["-m", "clipkit"]
    command = [*LAUNCH, f"--max-restarts={restarts}", *clipkit, "pretrain", "drawings_clip", *words]
    with err.open("w") as file:
        return launched(command, stdout=subprocess.DEVNULL, stderr=file, env=ENVIRONMENT)


def until_stopped(process):
    """Wait until rank 0 has stopped itself -> the process ids of both."""
    until(lambda: any(state(p) == "T" for p in _workers(process)), process)
    return sorted(_workers(process), key=lambda p: b"\0RANK=0\0" not in Path(f"/proc/{p}/environ").read_bytes())


def _workers(process):
    return children(process.pid, of=b"held.py")


def longer(packs, out, *more):
    return tiny(packs, out, STEPS, "run.batch_size=32", "data.workers=0", *more)


@pytest.fixture(scope="module")
def whole(packs, tmp_path_factory):
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    assert ended(torchrun(out / "err", longer(packs, out / "run"))) == 0, (out / "err").read_text()
    return out / "run"


def test_a_killed_rank_is_started_again_and_ends_the_same(packs, whole, tmp_path, times):
    for kill in range(times(1, 20)):
        out, err = tmp_path / f"killed{kill}", tmp_path / "err"
        process = torchrun(err, longer(packs, out), stop=10 + kill, restarts=1)
        ranks = until_stopped(process)
        os.kill(ranks[kill % 2], signal.SIGKILL)
        if kill % 2:
            os.kill(ranks[0], signal.SIGCONT)
        assert ended(process) == 0, err.read_text()
        assert same(out, whole)


def test_a_hanging_rank_is_named_and_not_waited_for_forever(packs, tmp_path, times):
    """The limit is far above what a rank may be late by on a busy machine, and far below what it is by itself."""
    for hang in range(times(1, 5)):
        out, err, hung = tmp_path / f"run{hang}", tmp_path / "err", hang % 2
        process = torchrun(err, longer(packs, out, "run.timeout_minutes=0.5"), stop=5)
        ranks = until_stopped(process)
        if hung:
            os.kill(ranks[1], signal.SIGSTOP)
            os.kill(ranks[0], signal.SIGCONT)
        until(lambda r=ranks, h=hung: not state(r[1 - h]), process)
        os.kill(ranks[hung], signal.SIGKILL)  # torchrun would, some time later
        assert ended(process) != 0
        assert f"rank {hung} does not answer (run.timeout_minutes = 0.5); rank {1 - hung} stops" in err.read_text()


def _with_nans(packs, out, cases):
    return [_with_nan(packs, out / f"{poisoned}{where}", poisoned, where) for poisoned, where in cases]


def _with_nan(packs, out, poisoned, where):
    """Train on this rank; rank `poisoned` meets a NaN in step 3. Which weights are as they were before that step."""
    from clipkit.config import load_recipe
    from clipkit.train import launch, pretrain

    original, steps, seen = pretrain.Pretraining.loss, [], {}

    def loss(self, features, batch):
        steps.append(1)
        if len(steps) == 4:
            seen["before"] = {n: t.clone() for n, t in self.model.state_dict().items()}
            seen["model"] = self.model
        value, values = original(self, features, batch)
        if len(steps) == 4 and distributed.rank() == poisoned:
            if where == "loss":
                return value * float("nan"), values
            return value + (features[2] - features[2].detach()).abs().sqrt().sum(), values
        return value, values

    pretrain.Pretraining.loss = loss
    words = tiny(packs, out, 6, "data.workers=0", "run.batch_size=24")
    recipe = load_recipe(pretrain.PretrainRecipe, "drawings_clip", words)
    with pytest.raises(NonFiniteError, match=r"step 3: .*no weight was changed"):
        launch.train_recipe(recipe, pretrain.Pretraining, torch.device("cpu"))
    pretrain.Pretraining.loss = original
    return torch.tensor([torch.equal(seen["before"][n], t) for n, t in seen["model"].state_dict().items()])


def test_a_nan_on_one_rank_stops_all_with_the_weights_unchanged(packs, tmp_path, times):
    cases = [(rank, where) for rank in range(2) for where in ("loss", "gradient")]
    for world in (2, 3, 4)[: times(1, 3)]:
        for found in on_ranks(world, _with_nans, packs, tmp_path / str(world), cases):
            assert len(found) == len(cases)
            assert all(unchanged.all() for unchanged in found)


def test_told_to_stop_all_ranks_stop_at_the_same_step(packs, whole, tmp_path):
    out, err = tmp_path / "run", tmp_path / "err"
    process = torchrun(err, longer(packs, out), stop=20)
    ranks = until_stopped(process)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    until(lambda: is_pending(ranks[0], signal.SIGTERM), process)
    os.kill(ranks[0], signal.SIGCONT)
    ended(process)
    assert "stopped by SIGTERM, saved at step" in err.read_text()
    assert 20 <= checkpoint.latest(out).step < STEPS
    assert ended(torchrun(err, longer(packs, out))) == 0, err.read_text()
    assert same(out, whole)
