"""One rank dies, hangs, or meets a NaN: rows 7 to 9 of docs/reliability.md."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from killing import final, same, steps_done, tiny, until
from ranks import on_ranks

from clipkit import distributed
from clipkit.errors import NonFiniteError

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(err, *words, restarts=0):
    command = [*LAUNCH, f"--max-restarts={restarts}", "-m", "clipkit", "pretrain", "drawings_clip", *words]
    with err.open("w") as file:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=ENVIRONMENT)


def workers(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(int(p) for p in children if b"clipkit" in Path(f"/proc/{p}/cmdline").read_bytes())


def longer(packs, out, *more):
    return tiny(packs, out, 150, "run.batch_size=32", "data.workers=0", *more)


def test_a_killed_rank_is_started_again_and_ends_the_same(packs, tmp_path, times):
    assert torchrun(tmp_path / "err", *longer(packs, tmp_path / "whole")).wait(300) == 0
    for kill in range(times(1, 20)):
        out = tmp_path / f"killed{kill}"
        process = torchrun(tmp_path / "err", *longer(packs, out), restarts=1)
        until(lambda o=out, k=kill: steps_done(o) > 10 + 5 * k)
        os.kill(workers(process)[kill % 2], signal.SIGKILL)
        assert process.wait(300) == 0, (tmp_path / "err").read_text()
        assert same(out, tmp_path / "whole")


def test_a_hanging_rank_is_named_and_not_waited_for_forever(packs, tmp_path, times):
    minutes = 0.1
    for hang in range(times(1, 5)):
        out, err = tmp_path / f"run{hang}", tmp_path / "err"
        process = torchrun(err, *longer(packs, out, "run.steps=5000", f"run.timeout_minutes={minutes}"))
        until(lambda o=out: steps_done(o) > 5)
        ranks = workers(process)
        hung = hang % 2
        stopped = next(p for p in ranks if f"RANK={hung}".encode() in _environment(p))
        os.kill(stopped, signal.SIGSTOP)
        began = time.monotonic()
        until(lambda r=ranks, s=stopped: all(not _runs(p) for p in r if p != s), seconds=60 * minutes + 60)
        waited = time.monotonic() - began
        os.kill(stopped, signal.SIGKILL)  # torchrun would, half a minute later
        assert process.wait(120) != 0
        assert waited < 60 * minutes + 30
        assert f"rank {hung} does not answer (run.timeout_minutes = 0.1); rank {1 - hung} stops" in err.read_text()


def _environment(pid):
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _with_nan(packs, out, poisoned, where):
    """Train on this rank; rank `poisoned` meets a NaN in step 3. What is left, and what was said."""
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
    return torch.tensor([torch.equal(seen["before"][n], t) for n, t in seen["model"].state_dict().items()])


def test_a_nan_on_one_rank_stops_all_with_the_weights_unchanged(packs, tmp_path, times):
    cases = [(rank, where, world) for world in (2, 3, 4) for rank in range(2) for where in ("loss", "gradient")]
    for rank, where, world in cases[: times(2, 12)]:
        for unchanged in on_ranks(world, _with_nan, packs, tmp_path / f"{rank}{where}{world}", rank, where):
            assert unchanged.all()


def test_told_to_stop_all_ranks_stop_at_the_same_step(packs, tmp_path):
    out, err = tmp_path / "run", tmp_path / "err"
    process = torchrun(err, *longer(packs, out))
    until(lambda: steps_done(out) > 20)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    process.wait(60)
    assert "stopped by SIGTERM, saved at step" in err.read_text()
    assert final(out)
    assert torchrun(err, *longer(packs, out)).wait(300) == 0, err.read_text()
    assert torchrun(err, *longer(packs, tmp_path / "whole")).wait(300) == 0
    assert same(out, tmp_path / "whole")
