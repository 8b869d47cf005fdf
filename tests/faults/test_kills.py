"""Kill it anywhere and it resumes, with the same bits: rows 1 to 3 and 13 of docs/reliability.md."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import held
import pytest
import torch
from process_faults import (
    ended,
    is_pending,
    killed_before_call,
    launched,
    loaders,
    same,
    state,
    steps_done,
    tiny,
    training,
    until,
    until_stopped,
)

from clipkit import checkpoint
from clipkit.async_checkpoint import lock

STEPS = 40


def run(words, err):
    assert ended(training(words, err)) == 0, err.read_text()


@pytest.fixture(scope="module")
def whole(packs, tmp_path_factory):
    """Runs that nothing happened to, by their number of steps."""
    made = {}

    def make(steps):
        if steps not in made:
            made[steps] = tmp_path_factory.mktemp("whole")
            run(tiny(packs, made[steps], steps), made[steps] / "err")
        return made[steps]

    return make


def test_kill_9_at_a_random_moment(packs, whole, tmp_path, times):
    """It dies at the latest where the moment's limit is, a step further, so that no machine is too fast for it."""
    kills, chance = times(5, 100), random.Random(0)
    steps = max(STEPS, 8 * kills)
    words, err, out = tiny(packs, tmp_path / "run", steps), tmp_path / "err", tmp_path / "run"
    for kill in range(kills):
        if kill % 5:  # while it trains and saves
            goal = steps_done(out) + 1 + chance.randrange(4)
            process = training(words, err, [(goal, signal.SIGSTOP), (goal + 1, signal.SIGKILL)])
            until_stopped(process)
            assert steps_done(out) == goal
            os.kill(process.pid, signal.SIGCONT)
            time.sleep(chance.random() * 0.03)
            process.kill()
        else:  # while it starts, takes its first steps and saves
            process = training(words, err, access=1 + chance.randrange(60))
        assert ended(process) == -signal.SIGKILL, err.read_text()
    assert steps_done(out) < steps
    run(words, err)
    assert same(out, whole(steps))


def test_the_installed_command_survives_a_kill_too(packs, whole, tmp_path):
    out = tmp_path / "run"
    words = ["pretrain", "drawings_clip", *tiny(packs, out, STEPS)]
    quiet = {"stderr": subprocess.DEVNULL, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    process = launched([sys.executable, held.__file__, held.words([(20, signal.SIGKILL)]), *words], **quiet)
    assert ended(process) == -signal.SIGKILL
    assert steps_done(out) == 20
    assert ended(launched([sys.executable, "-m", "clipkit", *words], **quiet)) == 0
    assert same(out, whole(STEPS))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_told_to_stop_it_saves_and_ends_well(packs, whole, tmp_path, times, number, code):
    out, err = tmp_path / "run", tmp_path / "err"
    stops = times(1, 10)
    for stop in range(stops):
        process = training(tiny(packs, out, STEPS), err, [(3 * (stop + 1), signal.SIGSTOP)])
        until_stopped(process)
        os.kill(process.pid, number)
        os.kill(process.pid, signal.SIGCONT)
        assert ended(process) == code, err.read_text()
        assert "the same command resumes" in err.read_text()
        assert "Traceback" not in err.read_text()
        assert checkpoint.latest(out).step == steps_done(out) < STEPS  # not a step is lost
    run(tiny(packs, out, STEPS), err)
    assert same(out, whole(STEPS))


def test_a_signal_to_the_whole_group_is_the_main_process_s_to_obey(packs, tmp_path):
    out, err = tmp_path / "run", tmp_path / "err"
    process = training(tiny(packs, out, STEPS, "data.workers=2"), err, [(5, signal.SIGSTOP)])
    until_stopped(process)
    found = loaders(process)
    assert len(found) == 2
    for _ in range(2):  # who has taken a second signal has outlived the first
        for pid in found:
            os.kill(pid, signal.SIGTERM)
        until(lambda: not any(is_pending(p, signal.SIGTERM) for p in found))
    assert all(state(p) for p in found)
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    assert ended(process) == 0, err.read_text()
    assert checkpoint.latest(out).step == steps_done(out) < STEPS
    until(lambda: not any(state(p) for p in found))


def test_a_closed_terminal_ends_a_run_that_has_saved(packs, tmp_path):
    """As when a connection is lost. What holds the terminal is killed; the run has a progress bar, and loaders."""
    out, code, run, pid = tmp_path / "run", tmp_path / "code", tmp_path / "run.py", tmp_path / "pid"
    words = ["pretrain", "drawings_clip", *tiny(packs, out, STEPS, "data.workers=1")]
    run.write_text(
        f"import os, sys\nsys.path.insert(0, {str(Path(held.__file__).parent)!r})\nimport held\n"
        f"from clipkit.cli import main\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\n"
        f"held.at_steps([(5, {int(signal.SIGSTOP)})])\n"
        f"try:\n    main({words!r})\n"
        f"except SystemExit as end:\n    open({str(code)!r}, 'w').write(str(end.code))\n"
    )
    hear = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # whoever runs the tests may be under nohup
    hold = f"{hear}; import pty; pty.spawn([{sys.executable!r}, {str(run)!r}])"
    holder = launched([sys.executable, "-c", hold], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until(lambda: pid.is_file() and pid.read_text(), holder)
    runner = int(pid.read_text())
    try:
        until(lambda: state(runner) == "T", holder)
        holder.kill()
        ended(holder)
        os.kill(runner, signal.SIGCONT)  # the system sends it too, with the news
        until(lambda: not state(runner))
    finally:
        if state(runner):  # it would train on after the test
            os.kill(runner, signal.SIGKILL)
    assert code.read_text() == "0"
    assert checkpoint.latest(out).step == steps_done(out) < STEPS


def test_a_second_interrupt_does_not_wait(packs, tmp_path):
    """Both come in the first step, which is an epoch: before the line of the step, and before that of the epoch."""
    out, err = tmp_path / "run", tmp_path / "err"
    once, twice = [(0, signal.SIGINT)], [(0, signal.SIGINT), (1, signal.SIGINT)]
    words = tiny(packs, out, STEPS, "run.batch_size=240")
    assert ended(training(words, err, twice)) == 130, err.read_text()
    assert checkpoint.latest(out) is None
    assert ended(training(words, err, once)) == 130, err.read_text()
    assert checkpoint.latest(out).step == 1


def test_a_killed_run_leaves_no_process_behind(packs, tmp_path):
    process = training(tiny(packs, tmp_path / "run", STEPS, "data.workers=2"), tmp_path / "err", [(5, signal.SIGSTOP)])
    until_stopped(process)
    found = loaders(process)
    assert len(found) == 2
    process.kill()
    ended(process)
    until(lambda: not any(state(p) for p in found))


def _save(run, step, size=64):
    tensors = {"model": {"w": torch.full((size,), float(step))}, "optimizer": {"m": torch.zeros(size)}}
    return checkpoint.save(run, {"step": step, "kind": "clip"}, tensors, {"tokenizer.json": "{}"}, 2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ptrace")
def test_kill_9_between_any_two_system_calls_of_a_save(tmp_path, times):
    _save(tmp_path / "before", 1)
    points = 0
    for repeat in range(times(1, 20)):
        steps, call = [], 0
        while True:
            run = tmp_path / "run"
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(tmp_path / "before", run)
            alive = killed_before_call(lambda r=run, n=64 << repeat % 8: _save(r, 2, n), call)
            found = checkpoint.latest(run)
            steps.append(found.step)
            assert found.tensors("model")["w"].tolist()[0] == found.step
            if call % 10 == 0:  # and the next save is not in the way of what is left
                _save(run, 3)
                assert checkpoint.latest(run).step == 3
                assert not list((run / "checkpoints").glob(".*"))
            if not alive:
                break
            call += 1
        points += call
        assert steps[0] == 1
        assert steps[-1] == 2
    assert points > 50


def test_two_runs_in_one_folder(packs, tmp_path):
    out, err = tmp_path / "run", tmp_path / "err"
    process = training(tiny(packs, out, STEPS, "data.workers=2"), err, [(1, signal.SIGSTOP)])
    until_stopped(process)
    assert ended(training(tiny(packs, out, STEPS), tmp_path / "err2")) == 1
    assert f"{out} is being trained by process {process.pid} on " in (tmp_path / "err2").read_text()
    process.kill()
    ended(process)
    with lock(out):  # its loader processes, which may live for a moment, hold nothing
        assert ended(training(tiny(packs, out, STEPS), tmp_path / "err3")) == 1
    assert f"process {os.getpid()} on " in (tmp_path / "err3").read_text()


def test_a_killed_loader_process_is_named_with_its_shard(packs, whole, tmp_path, times):
    out, err = tmp_path / "run", tmp_path / "err"
    for kill in range(times(1, 10)):
        # Eight batches are on their way: the run is not at its end before it needs one of the dead.
        process = training(tiny(packs, out, STEPS, "data.workers=2"), err, [(10 + 2 * kill, signal.SIGSTOP)])
        until_stopped(process)
        os.kill(loaders(process)[kill % 2], signal.SIGKILL)
        os.kill(process.pid, signal.SIGCONT)
        assert ended(process) == 1, err.read_text()
        assert "a loader process died while reading" in err.read_text()
        assert "shard-00000" in err.read_text()
        assert "Traceback" not in err.read_text()
    run(tiny(packs, out, STEPS), err)
    assert same(out, whole(STEPS))
