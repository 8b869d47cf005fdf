"""Kill it anywhere and it resumes, with the same bits: rows 1 to 3 and 13 of docs/reliability.md."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from killing import killed_before_call, same, steps_done, tiny, training, until

from clipkit import checkpoint
from clipkit.saver import lock

STEPS = 40


def run(words, err):
    process = training(words, err)
    process.join(300)
    assert process.exitcode == 0, err.read_text()


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
    kills, chance = times(5, 100), random.Random(0)
    steps = STEPS * kills
    out, survived = tmp_path / "run", 0
    for kill in range(kills):
        process = training(tiny(packs, out, steps), tmp_path / "err")
        if kill % 5:  # while it trains and saves
            goal = steps_done(out) + 1 + chance.randrange(4)
            until(lambda g=goal: steps_done(out) >= g, process)
            time.sleep(chance.random() * 0.03)
        else:  # while it starts
            time.sleep(chance.random() * 1.5)
        process.kill()
        process.join()
        survived += process.exitcode == 0
    assert survived < kills / 2
    run(tiny(packs, out, steps), tmp_path / "err")
    assert same(out, whole(steps))


def test_the_installed_command_survives_a_kill_too(packs, whole, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "clipkit", "pretrain", "drawings_clip", *tiny(packs, out, STEPS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    until(lambda: steps_done(out) > 20)
    process.kill()
    process.wait()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, env=environment)
    assert same(out, whole(STEPS))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_told_to_stop_it_saves_and_ends_well(packs, whole, tmp_path, times, number, code):
    out, err = tmp_path / "run", tmp_path / "err"
    stops = times(1, 10)
    for stop in range(stops):
        process = training(tiny(packs, out, STEPS), err)
        before = stop * STEPS // (stops + 1)
        until(lambda b=before: steps_done(out) > b, process)
        os.kill(process.pid, number)
        process.join(60)
        assert process.exitcode == code, err.read_text()
        assert "the same command resumes" in err.read_text()
        assert "Traceback" not in err.read_text()
        assert checkpoint.latest(out).step == steps_done(out)  # not a step is lost
    run(tiny(packs, out, STEPS), err)
    assert same(out, whole(STEPS))


def test_a_signal_to_the_whole_group_is_the_main_process_s_to_obey(packs, tmp_path):
    out, err = tmp_path / "run", tmp_path / "err"
    process = training(tiny(packs, out, 5000, "data.workers=2"), err)
    until(lambda: steps_done(out) > 5, process)
    loaders = _loaders(process.pid)
    assert len(loaders) == 2
    for pid in loaders:
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.2)
    assert all(_alive(p) for p in loaders)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0, err.read_text()
    assert checkpoint.latest(out).step == steps_done(out)
    until(lambda: not any(_alive(p) for p in loaders), seconds=20)


def test_a_closed_terminal_ends_a_run_that_has_saved(packs, tmp_path):
    """As when a connection is lost. What holds the terminal is killed; the run has a progress bar, and loaders."""
    out, code, run, pid = tmp_path / "run", tmp_path / "code", tmp_path / "run.py", tmp_path / "pid"
    words = ["pretrain", "drawings_clip", *tiny(packs, out, 5000, "data.workers=1")]
    run.write_text(
        f"import os\nfrom clipkit.cli import main\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\n"
        f"try:\n    main({words!r})\n"
        f"except SystemExit as end:\n    open({str(code)!r}, 'w').write(str(end.code))\n"
    )
    hear = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # whoever runs the tests may be under nohup
    hold = f"{hear}; import pty; pty.spawn([{sys.executable!r}, {str(run)!r}])"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        until(lambda: steps_done(out) > 5)
        holder.kill()
        holder.wait()
        until(lambda: code.is_file() and code.read_text())
    finally:
        if not code.is_file():  # it would train on after the test
            os.kill(int(pid.read_text()), signal.SIGKILL)
    assert code.read_text() == "0"
    assert checkpoint.latest(out).step == steps_done(out) < 5000


def test_a_second_interrupt_does_not_wait(packs, tmp_path):
    out, err = tmp_path / "run", tmp_path / "err"
    process = training(tiny(packs, out, 5000, "run.batch_size=240"), err)
    until(lambda: steps_done(out) > 1, process)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130


def test_a_killed_run_leaves_no_process_behind(packs, tmp_path):
    out = tmp_path / "run"
    process = training(tiny(packs, out, 5000, "data.workers=2"), tmp_path / "err")
    until(lambda: steps_done(out) > 5, process)
    loaders = _loaders(process.pid)
    assert len(loaders) == 2
    process.kill()
    process.join()
    until(lambda: not any(_alive(p) for p in loaders), seconds=20)


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


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
        assert steps == sorted(steps)  # from some call on, the new one counts
        assert {1, 2} == set(steps)
    assert points > 50


def test_two_runs_in_one_folder(packs, tmp_path):
    out, err = tmp_path / "run", tmp_path / "err"
    process = training(tiny(packs, out, 5000, "data.workers=2"), err)
    until(lambda: steps_done(out) > 1, process)
    second = training(tiny(packs, out, 5000), tmp_path / "err2")
    second.join(60)
    assert second.exitcode == 1
    assert f"{out} is being trained by process {process.pid} on " in (tmp_path / "err2").read_text()
    process.kill()
    process.join()
    with lock(out):  # its loader processes, which may live for a moment, hold nothing
        third = training(tiny(packs, out, 5000), tmp_path / "err3")
        third.join(60)
    assert third.exitcode == 1
    assert f"process {os.getpid()} on " in (tmp_path / "err3").read_text()


def test_a_killed_loader_process_is_named_with_its_shard(packs, whole, tmp_path, times):
    out, err = tmp_path / "run", tmp_path / "err"
    kills = times(1, 10)
    loader_steps = 200 + 30 * kills  # a fast machine is far beyond the step that was waited for
    for kill in range(kills):
        process = training(tiny(packs, out, loader_steps, "data.workers=2"), err)
        until(lambda k=kill: steps_done(out) > 10 + 25 * k, process)
        children = _loaders(process.pid)
        os.kill(children[kill % len(children)], signal.SIGKILL)
        process.join(60)
        assert process.exitcode == 1, err.read_text()
        assert "a loader process died while reading" in err.read_text()
        assert "shard-00000" in err.read_text()
        assert "Traceback" not in err.read_text()
    run(tiny(packs, out, loader_steps), err)
    assert same(out, whole(loader_steps))


def _loaders(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = [int(p) for p in file.read().split()]

    def name(p):
        with open(f"/proc/{p}/cmdline") as file:
            return file.read()

    return [p for p in children if "resource_tracker" not in name(p)]
