from itertools import accumulate

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from clipkit.data.sample_order import Mixture, Order

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=9)


def starts(sizes):
    return [0, *accumulate(sizes)]


@given(sizes=SIZES, window=st.integers(0, 12), seed=st.integers(0, 9), epoch=st.integers(0, 50))
@settings(max_examples=200)
def test_each_sample_once_per_epoch_whatever_the_window(sizes, window, seed, epoch):
    order, n = Order(starts(sizes), window, seed), sum(sizes)
    assert sorted(order(epoch * n + i) for i in range(n)) == list(range(n))


@given(sizes=SIZES, window=st.integers(0, 12), data=st.data())
def test_a_position_has_one_sample_whoever_asks_and_when(sizes, window, data):
    n = sum(sizes)
    positions = data.draw(st.lists(st.integers(0, 5 * n), min_size=1, max_size=20))
    straight = {p: Order(starts(sizes), window, 3)(p) for p in positions}
    jumping = Order(starts(sizes), window, 3)
    assert all(jumping(p) == straight[p] for p in positions)


def test_epochs_and_seeds_differ():
    sizes = [50] * 6
    for window in (0, 2):
        epochs = [tuple(Order(starts(sizes), window, 0)(e * 300 + i) for i in range(300)) for e in range(3)]
        other = tuple(Order(starts(sizes), window, 1)(i) for i in range(300))
        assert len({*epochs, other}) == 4


def test_a_window_needs_only_its_shards():
    order = Order(starts([10] * 8), 3, 0)
    for first in (0, 30, 60):
        samples = {order(first + i) // 10 for i in range(min(30, 80 - first))}
        assert samples == set(order.shards(first // 30))


def test_how_well_it_shuffles():
    """Neighbours of an epoch come from the whole window; places of one sample in many epochs are spread evenly."""
    order, n = Order(starts([100] * 10), 5, 0), 1000
    epoch = np.array([order(i) for i in range(n)])
    shards = epoch // 100
    same = (shards[1:] == shards[:-1]).mean()
    assert abs(same - 1 / 5) < 0.04  # 1/5 when the five shards of a window are mixed perfectly
    assert abs(np.corrcoef(epoch[:-1], epoch[1:])[0, 1]) < 0.35
    full = np.array([Order(starts([100] * 10), 0, 0)(i) for i in range(n)])
    assert abs(np.corrcoef(full[:-1], full[1:])[0, 1]) < 0.08
    places = []
    for e in range(60):
        places.append(next(i for i in range(n) if order(e * n + i) == 123))
    quarters = np.histogram(places, bins=4, range=(0, n))[0]
    assert quarters.min() >= 5


@given(
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=4),
    start=st.integers(0, 5000),
    length=st.integers(1, 3000),
    seed=st.integers(0, 3),
)
@settings(max_examples=40, deadline=None)
def test_every_pack_of_a_mixture_goes_through_its_own_sequence(weights, start, length, seed):
    """From wherever one starts: each pack's positions come in order, none left out, none twice."""
    mixture = Mixture(weights, seed)
    found = [mixture(p) for p in range(start, start + length)]
    for pack in range(len(weights)):
        own = [position for p, position in found if p == pack]
        assert not own or own == list(range(own[0], own[0] + len(own)))


def test_a_mixture_holds_its_shares():
    found = [Mixture([0.5, 0.3, 0.2], 0)(p)[0] for p in range(2000)]
    assert [found.count(pack) for pack in range(3)] == [1000, 600, 400]
    assert len(set(found[:20])) > 1
