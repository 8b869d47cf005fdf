import json
import os
import shutil
import socket

import pytest
from process_faults import HANG, until
from servers import serve

from clipkit.config import DataConfig
from clipkit.data import remote
from clipkit.data.inspection import verify
from clipkit.data.loader import Stream
from clipkit.data.remote import Cache
from clipkit.data.shards import Shards
from clipkit.errors import DataError, ShardError, UsageError
from clipkit.io import sha256


class Clock:
    """Time that passes by `step` whenever it is asked for, and pauses that are only noted."""

    def __init__(self, step=0.0):
        self.now, self.step, self.pauses = 0.0, step, []

    def monotonic(self):
        self.now += self.step
        return self.now

    def sleep(self, seconds):
        self.pauses.append(seconds)


@pytest.fixture
def clock(monkeypatch):
    """No time passes, so that no machine is too slow for a fault that is not about time."""
    found = Clock()
    monkeypatch.setattr(remote, "time", found)
    return found


@pytest.fixture
def server(packs, clock, monkeypatch):
    monkeypatch.setattr(remote, "STALL_SECONDS", HANG)
    with serve(packs / "train") as server:
        yield server


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache")


def content(shards):
    return [shards.read(i) for i in range(len(shards))]


NAME = "shard-000001.tar"


def test_a_pack_behind_a_url_equals_the_folder(packs, server, cache):
    assert content(Shards(server.url, cache=cache)) == content(Shards(packs / "train"))
    fetched = len(server.requests)
    assert content(Shards(server.url, cache=cache)) == content(Shards(packs / "train"))
    assert len(server.requests) == fetched + 1  # the index; the shards are in the cache


def test_only_what_is_read_is_fetched(server, cache):
    Shards(server.url, verify=False, cache=cache).read(150)
    assert [name for name, _ in server.requests] == ["pack.json", NAME]


@pytest.mark.parametrize(
    ("fault", "requests"),
    [
        ("500 twice", [None, None, None]),
        ("cut", [None, "rest"]),
        ("cut, unsaid", [None, "rest"]),
        ("no ranges", [None, "rest"]),
        ("wrong range", [None, "rest", None]),
        ("altered once", [None, None]),
    ],
)
def test_faults_that_pass(packs, server, cache, fault, requests):
    server.faults[NAME] = fault
    assert content(Shards(server.url, cache=cache)) == content(Shards(packs / "train"))
    half = (packs / "train" / NAME).stat().st_size // 2
    asked = [start for name, start in server.requests if name == NAME]
    assert asked == [half if r == "rest" else r for r in requests]


def test_a_remote_pack_of_version_0_1(packs, cache, tmp_path):
    folder = shutil.copytree(packs / "heldout", tmp_path / "pack")
    (folder / "pack.json").rename(folder / "index.json")
    with serve(folder) as server:
        assert content(Shards(server.url, cache=cache)) == content(Shards(packs / "heldout"))
        assert [name for name, _ in server.requests][:2] == ["pack.json", "index.json"]


def test_no_pack_behind_a_url(server, cache):
    server.faults |= {"pack.json": "404", "index.json": "404"}
    with pytest.raises(ShardError, match=r"pack\.json could not be fetched: the server answered 404"):
        Shards(server.url, cache=cache)


@pytest.mark.parametrize(
    ("fault", "message", "attempts"),
    [
        ("404", "answered 404", 1),
        ("html", "sent an HTML page", 1),
        ("always cut", "of .* bytes", 3),
        ("longer", "offers .* bytes, .* expected", 1),
        ("altered", "another sha256 than listed", 3),
        ("stall", "timed out", 3),
        ("trickle", "only 1 bytes came in", 3),
    ],
)
def test_faults_that_stay_are_one_error(server, clock, cache, monkeypatch, fault, message, attempts):
    shards = Shards(server.url, verify=False, cache=cache)
    server.faults[NAME] = fault
    if fault == "stall":
        monkeypatch.setattr(remote, "STALL_SECONDS", 0.2)
    if fault == "trickle":
        clock.step = remote.STALL_SECONDS + 1
    with pytest.raises(ShardError, match=message) as error:
        shards.read(150)
    assert f"{server.url}/{NAME} could not be fetched" in str(error.value)
    # A server that is slow to answer gets the last request when it has been given up.
    until(lambda: sum(name == NAME for name, _ in server.requests) >= attempts)
    assert sum(name == NAME for name, _ in server.requests) == attempts
    assert clock.pauses == [0.5, 1.0][: attempts - 1]
    assert not list(cache.folder.glob("*/shard*"))


def test_a_dead_server_costs_twenty_seconds():
    assert remote.ATTEMPTS * remote.STALL_SECONDS + 0.5 + 1.0 < 20


def test_what_a_killed_process_had_fetched_is_not_fetched_again(packs, server, tmp_path):
    path, data = tmp_path / NAME, (packs / "train" / NAME).read_bytes()
    path.with_name(f".{NAME}.part").write_bytes(data[:1234])
    remote.fetch(f"{server.url}/{NAME}", path, len(data), sha256(packs / "train" / NAME))
    assert path.read_bytes() == data
    assert server.requests == [(NAME, 1234)]


def test_the_cache_has_a_limit_and_forgets_the_longest_unused(packs, server, tmp_path):
    size = max(p.stat().st_size for p in (packs / "train").glob("*.tar"))
    cache = Cache(tmp_path / "cache", 2 * size + 1000)
    shards = Shards(server.url, verify=False, cache=cache)
    for i in (0, 100, 200):
        shards.read(i)
        until(lambda: _clock_of_the_disk(tmp_path) > max(p.stat().st_mtime_ns for p in cache.folder.glob("*/*.tar")))
    assert sorted(p.name for p in cache.folder.glob("*/*.tar")) == [NAME, "shard-000002.tar"]
    assert shards.read(0) == Shards(packs / "train").read(0)  # its file is open still
    assert Shards(server.url, verify=False, cache=cache).read(0) == Shards(packs / "train").read(0)


def _clock_of_the_disk(folder):
    (folder / "now").touch()
    os.utime(folder / "now")
    return (folder / "now").stat().st_mtime_ns


def test_no_server(clock, cache):
    with socket.socket() as nobody:  # who holds the port, and does not listen
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        with pytest.raises(ShardError, match=rf"127\.0\.0\.1:{port}/pack/pack\.json could not be fetched: .*refused"):
            Shards(f"http://127.0.0.1:{port}/pack", cache=cache)
    assert clock.pauses == [0.5, 1.0]


def test_no_pack_there(server, cache):
    with pytest.raises(ShardError, match="answered 404"):
        Shards(f"{server.url}/nothing", cache=cache)


@pytest.mark.parametrize("source", ["pipe:cat x", "pipe:curl http://x/y.tar"])
def test_nothing_is_run(source):
    with pytest.raises(UsageError, match="pipe: would run a program"):
        Shards(source)


def test_any_fsspec_url(packs, clock, cache):
    import fsspec

    files = fsspec.filesystem("memory")
    for path in (packs / "train").iterdir():
        files.pipe_file(f"/pack/{path.name}", path.read_bytes())
    assert content(Shards("memory://pack", cache=cache)) == content(Shards(packs / "train"))
    files.pipe_file(f"/pack/{NAME}", b"x" * 100)
    with pytest.raises(ShardError, match="100 bytes came"):
        Shards("memory://pack", verify=False, cache=Cache(cache.folder / "other")).read(150)
    with pytest.raises(ShardError, match="FileNotFoundError"):
        Shards("memory://nothing", cache=cache)
    with pytest.raises(ShardError, match=r"could not be fetched: ValueError|needs another package"):
        Shards("nonsense://bucket/pack", cache=cache)


def test_training_from_a_url_goes_window_by_window(packs, server, tmp_path):
    def config(**more):
        return DataConfig("", workers=0, shuffle_window=1, cache=str(tmp_path / "cache"), **more)

    cache = Cache(tmp_path / "cache")
    remote_stream = Stream(Shards(server.url, verify=False, cache=cache), config(), 24, 40, 0)
    local_stream = Stream(Shards(packs / "train", verify=False), config(), 24, 40, 0)
    keys = [[k for b in stream.batches(0, 9) for k in b.keys] for stream in (remote_stream, local_stream)]
    assert keys[0] == keys[1]
    with pytest.raises(DataError, match=r"two windows of 1 shards are .* lower data\.shuffle_window"):
        Stream(Shards(server.url, verify=False, cache=cache), config(cache_gb=0.0001), 24, 40, 0)


def test_the_next_window_is_fetched_meanwhile(server, tmp_path):
    config = DataConfig("", workers=0, shuffle_window=1, cache=str(tmp_path / "cache"))
    stream = Stream(Shards(server.url, verify=False, cache=Cache(tmp_path / "cache")), config, 24, 1, 0)
    batches = stream.batches(0, 1)
    next(batches)
    until(lambda: len({name for name, _ in server.requests}) >= 3)
    batches.close()
    assert len({name for name, _ in server.requests}) == 3  # the index, this window's shard and the next one's


def test_verify_a_url(server, cache):
    assert verify(server.url, 2, cache).damaged == {}
    server.faults[NAME] = "404"
    damaged = verify(server.url, 2, Cache(cache.folder / "other")).damaged
    assert list(damaged) == [NAME]
    assert json.dumps(damaged)


def test_the_cache_is_where_xdg_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Cache().root == tmp_path / "clipkit"
    assert Cache(tmp_path / "own").root == tmp_path / "own"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Cache().root == tmp_path / "home" / ".cache" / "clipkit"
