import multiprocessing
import os
import shutil
import signal
import subprocess
from itertools import accumulate
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipkit.config import DataConfig
from clipkit.data.loader import Batch, Stream
from clipkit.data.sample_order import Order
from clipkit.data.shards import Shards
from clipkit.errors import DataError, RecipeError, ShardError
from clipkit.models.tokenizer import Tokenizer


def keys(stream, start, stop):
    return [key for batch in stream.batches(start, stop) for key in batch.keys]


def make(packs, batch=32, seed=0, rank=0, world=1, workers=0):
    return Stream(
        Shards(packs / "heldout", verify=False), DataConfig("", workers=workers), 32, batch, seed, rank, world
    )


def order(stream, start, stop):
    """Sample indices of steps start to stop, without reading them."""
    return [stream.samples.locate(p)[1] for step in range(start, stop) for p in stream.positions(step)]


@given(batch=st.integers(1, 90), seed=st.integers(0, 5))
@settings(max_examples=30)
def test_each_sample_once_per_epoch_and_epochs_differ(packs, batch, seed):
    stream = make(packs, batch, seed)
    steps = -(-3 * 64 // batch)
    sequence = order(stream, 0, steps)
    epochs = [sequence[e * 64 : (e + 1) * 64] for e in range(3)]
    assert all(sorted(e) == list(range(64)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@given(world=st.integers(1, 6), share=st.integers(1, 9), start=st.integers(0, 20))
@settings(max_examples=40)
def test_any_number_of_ranks_continues_the_same_order_from_any_step(packs, world, share, start):
    batch = world * share
    ranks = [make(packs, batch, rank=r, world=world) for r in range(world)]
    together = [i for step in range(start, start + 4) for r in ranks for i in order(r, step, step + 1)]
    assert together == order(make(packs, batch), start, start + 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_early_steps_see_smaller_pictures_wherever_a_run_starts(packs, workers):
    shards, config = Shards(packs / "heldout", verify=False), DataConfig("", workers=workers)
    streams = [Stream(shards, config, 24, 12, 0, rank, 2, early_size=16, early_steps=3) for rank in (0, 1)]
    for stream in streams:
        assert [batch.images.shape for batch in stream.batches(0, 5)] == [(6, 3, s, s) for s in (16, 16, 16, 24, 24)]
        assert [batch.images.shape[-1] for batch in stream.batches(2, 4)] == [16, 24]


def test_packs_are_mixed_without_mixing_up_their_classes(packs):
    config = DataConfig("", workers=0, mix={str(packs / "train"): 0.25})
    stream = Stream(Shards(packs / "heldout", verify=False), config, 32, 50, 0)
    batches = list(stream.batches(0, 20))
    groups = [int(g) >> 32 for batch in batches for g in batch.groups]
    assert (groups.count(0), groups.count(1)) == (750, 250)
    both = [key for batch in batches[10:] for key in batch.keys]
    assert both == keys(Stream(Shards(packs / "heldout", verify=False), config, 32, 50, 0), 10, 20)


@pytest.mark.parametrize("mix", [{"a": 1.0}, {"a": 0.6, "b": 0.4}, {"a": -0.1}])
def test_shares_that_leave_nothing(mix):
    with pytest.raises(RecipeError, match="leave some of 1 to"):
        DataConfig("", mix=mix)


def test_pixels_and_captions_do_not_depend_on_workers_or_ranks(packs):
    def content(batches):
        return [(k, c, i.sum().item()) for b in batches for k, c, i in zip(b.keys, b.captions, b.images, strict=True)]

    alone = content(make(packs, 16).batches(0, 4))
    assert content(make(packs, 16, workers=2).batches(0, 4)) == alone
    halves = [content(make(packs, 16, rank=r, world=2).batches(0, 4)) for r in range(2)]
    assert sorted(halves[0] + halves[1]) == sorted(alone)


def test_resumes_in_the_middle(packs):
    assert keys(make(packs), 0, 6) == keys(make(packs), 0, 3) + keys(make(packs), 3, 6)


def test_indivisible_batch(packs):
    with pytest.raises(DataError, match="batch_size 10 does not divide over 3 ranks"):
        make(packs, 10, rank=0, world=3)


def _with_bad_images(tmp_path, bad, good=40):
    import webdataset

    from clipkit.data.drawings import draw
    from clipkit.data.sources import encode_png

    with webdataset.TarWriter(str(tmp_path / "shard-000000.tar")) as writer:
        for i in range(good + bad):
            image = b"not an image" if i < bad else encode_png(draw("train", 0, i).image)
            writer.write({"__key__": f"{i}", "png": image, "txt": b"a drawing"})
    return Stream(Shards(tmp_path), DataConfig("", workers=0), 32, 41, 0)


def test_a_bad_sample_is_skipped_and_counted(tmp_path):
    (batch,) = _with_bad_images(tmp_path, bad=1).batches(0, 1)
    assert len(batch.captions) == len(batch.images) == 40
    assert batch.skipped == {"not an image": 1}


def test_too_many_bad_samples_stop_the_run(tmp_path):
    with pytest.raises(DataError, match=r"not an image\), more than data.max_bad_fraction"):
        list(_with_bad_images(tmp_path, bad=20).batches(0, 60))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_goes_away_is_one_line(packs, tmp_path, workers):
    folder = shutil.copytree(packs / "train", tmp_path / "pack")
    stream = Stream(Shards(folder, verify=False), DataConfig("", workers=workers), 16, 16, 0, rank=1, world_size=2)
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(ShardError) as error:
        list(stream.batches(0, 40))
    assert str(error.value) == f"shard {folder / 'shard-000001.tar'} is missing"


def test_samples_of_others_without_image_or_caption_are_counted(tmp_path):
    """What is half a sample counts as one; what was not taken into the index is known, too."""
    import webdataset

    from clipkit.data.sources import encode_png

    picture = encode_png(Image.new("RGB", (40, 40)))
    with webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        for i in range(12):
            parts = {0: {"txt": b"a"}, 1: {"png": picture}, 2: {"gif": b"x", "json": b"{}"}}.get(i)
            writer.write({"__key__": str(i), **(parts or {"png": picture, "json": b'{"caption": "a"}'})})
        writer.write({"__key__": "11", "pkl": b"x"})
    stream = Stream(Shards(tmp_path), DataConfig("", workers=0, mix={str(tmp_path): 0.5}), 32, 24, 0)
    (batch,) = stream.batches(0, 1)
    assert batch.skipped == {"no image": 4, "no caption": 2}
    assert batch.captions == ["a"] * 18
    assert len({group & 0xFFFFFFFF for group in batch.groups.tolist()}) == 1
    assert stream.not_indexed == {"pickle": 2}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from Linux's /proc")
def test_memory_is_flat_over_twenty_epochs(packs):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    stream, steps_per_epoch, sizes = make(packs, 32), 2, []
    for step, _ in enumerate(stream.batches(0, 20 * steps_per_epoch)):
        if step % steps_per_epoch == steps_per_epoch - 1:
            sizes.append(resident())
    assert len(sizes) == 20
    assert max(sizes[10:]) - max(sizes[:5]) < 2 << 20


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    world=st.integers(1, 4),
    resumed_world=st.integers(1, 4),
    stop=st.integers(0, 12),
    window=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_resumed_by_other_ranks_after_any_stop_the_global_order_goes_on(sizes, world, resumed_world, stop, window):
    """Also with fewer shards, or samples, than ranks: each sample once an epoch, whoever reads it."""
    starts, batch = [0, *accumulate(sizes)], 12

    def global_order(first, last, ranks):
        found = []
        for step in range(first, last):
            for rank in range(ranks):
                order = Order(starts, window, 0)  # each rank has its own
                share = batch // ranks
                begin = step * batch + rank * share
                found += [order(p) for p in range(begin, begin + share)]
        return found

    together = global_order(0, stop, world) + global_order(stop, 15, resumed_world)
    assert together == global_order(0, 15, 1)
    n = starts[-1]
    for epoch in range(len(together) // n):
        assert sorted(together[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_a_pipe_that_ends_before_its_loaders_death_is_known(packs):
    """Then torch lets the pipe's own error through; what the user hears is the same."""
    stream = make(packs, workers=1)
    ended, cut = subprocess.Popen(["true"]), ConnectionResetError("reset by peer")
    ended.wait()
    assert stream.explain(cut) is cut  # no loader has begun
    stream.samples.whereabouts[0] = torch.tensor([ended.pid, 3])
    found = stream.explain(cut)
    assert isinstance(found, DataError)
    assert f"died while reading {stream.samples.name(3)}: reset by peer; the same" in str(found)
    assert "EOFError; the same" in str(stream.explain(EOFError()))
    other = RuntimeError("out of memory")
    assert stream.explain(other) is other


@pytest.fixture
def loader():
    """A process that lives until it is killed."""
    process = multiprocessing.get_context("forkserver").Process(target=signal.pause)
    process.start()
    yield process
    process.kill()
    process.join()


def test_a_loader_that_is_dying_is_waited_for(packs, loader, monkeypatch):
    """A process closes its pipes before it is dead; on a busy machine long before."""
    stream, cut = make(packs, workers=1), ConnectionResetError("reset by peer")
    stream.samples.whereabouts[0] = torch.tensor([loader.pid, 3])

    def dies_now(sentinels, seconds):
        loader.kill()
        return wait(sentinels)

    monkeypatch.setattr("clipkit.data.loader.wait", dies_now)
    assert f"died while reading {stream.samples.name(3)}: reset by peer" in str(stream.explain(cut))


def test_torch_may_speak_of_the_dead_meanwhile(packs, loader, monkeypatch):
    stream = make(packs, workers=1)
    stream.samples.whereabouts[0] = torch.tensor([loader.pid, 3])

    def interrupted(*_):
        raise RuntimeError(f"DataLoader worker (pid {loader.pid}) is killed by signal: Killed.")

    monkeypatch.setattr("clipkit.data.loader.wait", interrupted)
    found = str(stream.explain(ConnectionResetError("reset by peer")))
    assert f"died while reading {stream.samples.name(3)}: DataLoader worker (pid {loader.pid}) is killed" in found


def test_an_error_while_all_loaders_live_stays_as_it_is(packs, loader, monkeypatch):
    stream, other = make(packs, workers=1), OSError("another matter")
    stream.samples.whereabouts[0] = torch.tensor([loader.pid, 3])
    monkeypatch.setattr("clipkit.data.loader._DYING", 0.0)
    assert stream.explain(other) is other


@pytest.mark.parametrize("workers", [0, 2])
def test_token_ids_come_with_the_batch(packs, workers):
    tokenizer = Tokenizer.train(Shards(packs / "heldout").captions(20), 600)
    short = Tokenizer.from_json(tokenizer.to_json(), context_length=5)
    config = DataConfig("", workers=workers)
    stream = Stream(Shards(packs / "heldout"), config, 24, 7, 0, tokenizers=[tokenizer, short])
    for batch in stream.batches(0, 3):
        assert batch.tokens.keys() == {tokenizer.key, short.key}
        for each in (tokenizer, short):
            assert torch.equal(batch.ids(each), each(batch.captions))
            for part in batch.split(3):
                assert torch.equal(part.ids(each), each(part.captions))


def test_a_batch_without_its_token_ids_makes_them(packs):
    tokenizer = Tokenizer.train(Shards(packs / "heldout").captions(20), 600)
    (batch,) = make(packs).batches(0, 1)
    assert batch.tokens == {}
    assert torch.equal(batch.ids(tokenizer), tokenizer(batch.captions))


def test_a_batch_whose_samples_were_all_skipped_is_one_empty_part():
    batch = Batch(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), [], torch.zeros(0, dtype=torch.int64), [])
    (part,) = batch.split(4)
    assert len(part) == 0
