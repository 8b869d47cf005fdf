import pytest
import torch
from worlds import Mixture, sliced_w2

from clipkit.guidance import samplers
from clipkit.guidance.guiders import gradient, score_shift, softmax_log_prob
from clipkit.guidance.schedule import alpha, karras, leading, log_snr, sigma

N = 8000


def run(sampler, lambdas, scale=1.0, seed=0):
    world = Mixture()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    denoise = score_shift(world.log_prob(1), scale)(world.denoise)
    return sampler(denoise, x, lambdas, generator)


def distance(samples):
    return sliced_w2(samples, Mixture().sample(1, N, torch.Generator().manual_seed(99)))


def floor():
    return distance(Mixture().sample(1, N, torch.Generator().manual_seed(7)))


def test_guided_sampling_is_conditional_sampling():
    """Exact classifier, 2M, Karras spacing: nearly as close to the exact conditional as another sample of it."""
    assert distance(run(samplers.dpmpp_2m, karras(-9.0, 9.0, 25))) < 2 * floor()
    assert distance(run(samplers.dpmpp_2m, karras(-9.0, 9.0, 50))) < 1.5 * floor()


def test_ddim_gets_there_with_more_steps():
    few, many = (distance(run(samplers.ddim, karras(-9.0, 9.0, n))) for n in (10, 100))
    assert many < few / 2
    assert many < 2.5 * floor()


def test_ddpm_takes_guidance_too():
    assert distance(run(samplers.ddpm, leading(log_snr("cosine").clamp(min=-9), 250))) < 3 * floor()


def test_unguided_samples_are_of_every_class():
    assert distance(run(samplers.dpmpp_2m, karras(-9.0, 9.0, 25), scale=0.0)) > 10 * floor()


def test_scale_zero_is_the_denoiser_itself():
    world = Mixture()
    assert score_shift(world.log_prob(0), 0.0)(world.denoise) == world.denoise


def test_the_shift_of_eps_is_minus_scale_s_times_the_gradient():
    """eps' = eps - w s g and x0' = x0 + w s^2 / a g are one shift."""
    world, lam = Mixture(), torch.tensor([1.3, -0.4], dtype=torch.float64)
    x = torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain, guided = world.denoise(x, lam), score_shift(world.log_prob(2), 1.7)(world.denoise)(x, lam)
    g = gradient(world.log_prob(2), x, lam)
    a, s = alpha(lam)[:, None], sigma(lam)[:, None]
    torch.testing.assert_close(guided.eps, plain.eps - 1.7 * s * g)
    torch.testing.assert_close(a * guided.x0 + s * guided.eps, x)


def test_guiders_compose():
    """Two guiders' shifts add up."""
    world, lam = Mixture(), torch.tensor([0.5], dtype=torch.float64)
    x = torch.tensor([[0.2, -0.1]], dtype=torch.float64)
    first, second = score_shift(world.log_prob(0), 1.0), score_shift(world.log_prob(1), 0.5)
    base = world.denoise(x, lam).x0
    together = first(second(world.denoise))(x, lam).x0 - base
    apart = first(world.denoise)(x, lam).x0 + second(world.denoise)(x, lam).x0 - 2 * base
    torch.testing.assert_close(together, apart)


def test_softmax_takes_out_what_all_texts_share():
    similarity = torch.randn(3, 5, dtype=torch.float64)
    tau = torch.tensor([1.0, 5.0, 20.0]).double()
    log_p = softmax_log_prob(similarity, tau, 1)
    torch.testing.assert_close(softmax_log_prob(similarity + 3.0, tau, 1), log_p)
    torch.testing.assert_close(log_p, torch.log((tau[:, None] * similarity).softmax(1)[:, 0]))
    assert float(softmax_log_prob(similarity, tau, 5).abs().max()) == pytest.approx(0, abs=1e-12)
