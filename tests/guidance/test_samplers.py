import math

import pytest
import torch
from worlds import gaussian

from clipkit.guidance import samplers
from clipkit.guidance.schedule import karras, leading, log_snr


def slope(sampler, steps=(20, 40, 80)):
    """Order of convergence to the exact solution on Gaussian data."""
    denoise, transport = gaussian(0.7, 0.5)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = []
    for n in steps:
        lambdas = karras(-8.0, 8.0, n)
        # The last jump, to clean, is the same for all n; what is measured is the walk along the levels.
        a, s = math.sqrt(1 / (1 + math.exp(-8.0))), math.sqrt(1 / (1 + math.exp(8.0)))
        target = transport(x, -8.0)
        gain = a * 0.5**2 / (a**2 * 0.5**2 + s**2)
        spread = math.sqrt(a**2 * 0.5**2 + s**2)
        end = a * 0.7 + spread * (target - 0.7) / 0.5  # exact x at lambda = 8
        exact = 0.7 + gain * (end - a * 0.7)
        errors.append(float((sampler(denoise, x, lambdas) - exact).abs().max()))
    return math.log(errors[0] / errors[-1]) / math.log(steps[-1] / steps[0])


def test_ddim_is_of_first_order():
    assert 0.85 < slope(samplers.ddim) < 1.3


def test_dpmpp_2m_is_of_second_order():
    assert slope(samplers.dpmpp_2m) > 1.8


@pytest.mark.parametrize("steps", [10, 100, 300, 600, 999, 1000])
def test_more_steps_never_get_worse_whether_they_divide_t_or_not(steps):
    """diffusers' DDIM is off by 0.245 at 600 steps on its trailing grid; here it shrinks all the way."""
    denoise, transport = gaussian(0.7, 0.5)
    x = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lambdas = leading(log_snr("linear"), steps)
    error = (samplers.ddim(denoise, x, lambdas) - transport(x, float(lambdas[0]))).square().mean().sqrt()
    assert error < 2.5 / steps + 0.004


@pytest.mark.parametrize("sampler", [samplers.ddpm, lambda *a: samplers.ddim(*a, eta=1.0)])
@pytest.mark.parametrize("steps", [200, 1000])
def test_stochastic_samplers_reach_the_data(sampler, steps):
    denoise, _ = gaussian(0.7, 0.5)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=generator, dtype=torch.float64)
    out = sampler(denoise, x, leading(log_snr("linear"), steps), generator)
    assert float(out.mean()) == pytest.approx(0.7, abs=0.02)
    assert float(out.std()) == pytest.approx(0.5, abs=0.02)


class Net(torch.nn.Module):
    """A fixed nonlinear eps-network for step-by-step comparisons."""

    def forward(self, x, t):
        return torch.tanh(x) * 0.9 + 0.01 * math.sin(t / 100)


def denoise_with(net, table):
    from clipkit.guidance.denoiser import from_output

    def denoise(x, lam):
        t = int((table - lam).abs().argmin())
        return from_output("eps", net(x, t), x, lam.double())

    return denoise


def test_ddim_equals_diffusers_step_by_step():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="leading", set_alpha_to_one=True)
    table, net = log_snr("linear"), Net()
    # its leading grid: 980, 960, ..., 0
    scheduler.set_timesteps(50)
    theirs = x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas, 0)
    for t in scheduler.timesteps:
        theirs = scheduler.step(net(theirs, int(t)), t, theirs).prev_sample
    ours = samplers.ddim(denoise_with(net, table), x, table[scheduler.timesteps])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # parts of theirs are float32


def test_ddpm_equals_diffusers_given_the_same_noise(monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_ddpm

    scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type="fixed_small")
    scheduler.betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, 0)
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(20)
    table, net = log_snr("linear"), Net()
    theirs = x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(20)]
    feed = iter(noise)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, **k: next(feed))
    for t in scheduler.timesteps:
        theirs = scheduler.step(net(theirs, int(t)), t, theirs).prev_sample
    again = iter(noise)
    monkeypatch.setattr(samplers, "_noise", lambda x, generator: next(again))
    ours = samplers.ddpm(denoise_with(net, table), x, table[scheduler.timesteps])
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", [samplers.ddim, samplers.ddpm, samplers.dpmpp_2m])
def test_watch_sees_every_step_and_ends_on_the_result(sampler):
    denoise, _ = gaussian(0.0, 1.0)
    seen = []
    out = sampler(denoise, torch.ones(2), karras(-5, 5, 7), torch.Generator().manual_seed(0), seen.append)
    assert len(seen) == 7
    assert torch.equal(seen[-1], out)


@pytest.mark.parametrize("sampler", [samplers.ddim, samplers.ddpm, samplers.dpmpp_2m])
def test_one_step_is_the_denoiser(sampler):
    denoise, _ = gaussian(0.3, 0.5)
    x = torch.ones(2, dtype=torch.float64)
    expected = denoise(x, torch.tensor(-5.0)).x0
    assert torch.equal(sampler(denoise, x, torch.tensor([-5.0])), expected)
