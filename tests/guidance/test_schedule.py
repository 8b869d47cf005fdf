import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipkit.errors import UsageError
from clipkit.guidance import schedule
from clipkit.guidance.schedule import later_log_snr, log_snr


@pytest.mark.parametrize(("ours", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
def test_tables_equal_diffusers(ours, theirs):
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule=theirs).alphas_cumprod
    torch.testing.assert_close(schedule.alphas_cumprod(ours).float(), reference, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_log_snr_is_exact_where_float32_is_not(name):
    table = schedule.log_snr(name)
    assert table.dtype == torch.float64
    assert (table.diff() < 0).all()
    a2 = schedule.alphas_cumprod(name)
    torch.testing.assert_close(torch.sigmoid(table), a2, rtol=1e-12, atol=0)
    beta1 = 1e-4 if name == "linear" else float(1 - a2[0])
    assert float(table[0]) == pytest.approx(math.log((1 - beta1) / beta1), rel=1e-9)


@given(st.floats(-20, 20))
def test_variance_preserving(lam):
    lam = torch.tensor(lam, dtype=torch.float64)
    assert float(schedule.alpha(lam) ** 2 + schedule.sigma(lam) ** 2) == pytest.approx(1, abs=1e-12)
    assert float(2 * torch.log(schedule.alpha(lam) / schedule.sigma(lam))) == pytest.approx(float(lam), abs=1e-9)


def test_training_levels_are_stratified_over_time():
    torch.manual_seed(0)
    table = schedule.log_snr("cosine")
    lam = schedule.sample_log_snr("cosine", 100)
    ranks = torch.searchsorted(-table.float(), -lam).double() / len(table)
    assert sorted((ranks * 100).floor().tolist()) == pytest.approx(range(100), abs=1.01)
    assert not torch.equal(lam, lam.sort().values)


@pytest.mark.parametrize("steps", [1, 2, 7, 25, 300, 600, 999, 1000])
def test_leading_spacing_for_any_number_of_steps(steps):
    table = schedule.log_snr("linear")
    lam = schedule.linspace(table, steps)
    assert len(lam) == steps
    assert lam[0] == table[-1]
    if steps > 1:
        index = torch.searchsorted(-table, -lam)
        gaps = -index.diff()
        assert gaps.max() - gaps.min() <= 1
        assert lam[-1] == table[0]


def test_more_steps_than_levels():
    with pytest.raises(UsageError, match="1001 steps asked for"):
        schedule.linspace(schedule.log_snr("linear"), 1001)


def test_karras_spacing_is_equation_5():
    lam = schedule.karras(-8.0, 6.0, 10)
    sigma = torch.exp(-lam / 2)
    steps = torch.diff(sigma ** (1 / 7))
    torch.testing.assert_close(steps, steps[0].expand(9), rtol=1e-9, atol=0)
    assert (float(lam[0]), float(lam[-1])) == pytest.approx((-8.0, 6.0))


def test_unknown_schedule():
    with pytest.raises(UsageError, match="unknown noise schedule 'sine'; did you mean"):
        schedule.alphas_cumprod("sine")


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid", "flow", "edm"])
def test_every_schedule_falls_from_clean_to_noise(name):
    table = schedule.log_snr(name)
    assert table.dtype == torch.float64
    assert bool((table[1:] < table[:-1]).all())
    assert float(table[0]) > 4
    assert float(table[-1]) < -4


def test_scaled_linear_is_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    theirs = scheduler.alphas_cumprod.double()
    torch.testing.assert_close(schedule.alphas_cumprod("scaled_linear"), theirs, rtol=1e-4, atol=1e-6)


def test_the_flows_lambda_is_that_of_its_straight_line():
    """x_t = (1 - t) x0 + t e: signal to noise (1 - t)^2 / t^2."""
    t = (torch.arange(1000).double() + 0.5) / 1000
    torch.testing.assert_close(schedule.log_snr("flow"), torch.log((1 - t) ** 2 / t**2))


def test_edms_log_sigma_is_normal():
    log_sigma = -schedule.log_snr("edm", 100_000) / 2
    assert float(log_sigma.mean()) == pytest.approx(-1.2, abs=1e-3)
    assert float(log_sigma.std()) == pytest.approx(1.2, abs=1e-3)


def test_zero_terminal_snr_is_diffusers():
    pytest.importorskip("diffusers")
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    a2 = schedule.alphas_cumprod("scaled_linear")
    betas = 1 - torch.cat([a2[:1], a2[1:] / a2[:-1]])
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    ours = schedule.zero_terminal_snr(a2)
    torch.testing.assert_close(ours, theirs)
    assert ours[-1] == 0
    assert ours[0] == a2[0]


@pytest.mark.parametrize("steps", [1, 7, 50, 600, 999, 1000])
@pytest.mark.parametrize("how", ["linspace", "leading", "trailing"])
def test_spacings_have_even_gaps_and_their_ends(how, steps):
    index = 999 - schedule.spaced(torch.arange(1000).double().flip(0), steps, how).long()
    assert len(index) == steps
    assert bool((index[1:] < index[:-1]).all())
    gaps = index[:-1] - index[1:]
    if steps > 1:
        assert int(gaps.max() - gaps.min()) <= 1 + (how == "linspace" and steps < 1000)
    assert int(index[0]) == 999 or how == "leading"
    assert int(index[-1]) == 0 or how == "trailing" or steps == 1


@pytest.mark.parametrize("name", ["linear", "cosine", "flow"])
def test_the_later_level_is_the_tables_next(name):
    table = log_snr(name)
    torch.testing.assert_close(later_log_snr(name, table[1:]), table[:-1])
    assert float(later_log_snr(name, table[:1])) == float(table[0])
    between = torch.lerp(table[500], table[501], 0.25)[None]
    torch.testing.assert_close(later_log_snr(name, between), torch.lerp(table[499], table[500], 0.25)[None])


@given(st.floats(0, 1), st.sampled_from(["linear", "cosine", "flow", "edm"]))
def test_a_share_of_time_is_between_its_levels(share, name):
    table = log_snr(name)
    level = float(schedule.at_time(table, torch.tensor([share], dtype=torch.float64)))
    place = share * 999
    assert float(table[math.ceil(place)]) - 1e-9 <= level <= float(table[math.floor(place)]) + 1e-9


@given(st.floats(1e-6, 1), st.sampled_from(["cosine", "flow"]), st.booleans())
def test_a_table_until_a_share_of_time_is_its_beginning(share, name, clamped):
    table = log_snr(name).clamp(-10, 10) if clamped else log_snr(name)
    part = schedule.until(table, share)
    assert torch.equal(part[:-1], table[: len(part) - 1])
    assert 1 <= len(part) <= len(table)
    assert bool((part[:-1] > part[-1]).all())
    assert float(part[-1]) >= float(table[-1])
