import itertools

import pytest
import torch
import torch.nn.functional as F
from toy_distributions import Mixture, sliced_w2

from clipkit.errors import UsageError
from clipkit.guidance import samplers
from clipkit.guidance.denoiser import Prediction, clipped, from_x0
from clipkit.guidance.guiders import (
    classifier_free,
    compose,
    gradient,
    guidance_interval,
    ilvr,
    inpaint,
    mean_shift,
    score_shift,
    softmax_log_prob,
    through_x0,
)
from clipkit.guidance.schedule import alpha, karras, linspace, log_snr, sigma

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


def test_25_guided_steps_are_within_half_as_much_again_of_the_floor():
    """Means over six pairs of samples, as a single floor varies by a fifth."""
    world, lambdas = Mixture(), karras(-9.0, 9.0, 25)

    def exact(seed):
        return world.sample(1, N, torch.Generator().manual_seed(seed))

    drawn = [sliced_w2(run(samplers.dpmpp_2m, lambdas, seed=seed), exact(1000 + seed)) for seed in range(6)]
    floors = [sliced_w2(exact(2000 + seed), exact(1000 + seed)) for seed in range(6)]
    assert sum(drawn) < 1.5 * sum(floors)


def test_ddim_gets_there_with_more_steps():
    few, many = (distance(run(samplers.ddim, karras(-9.0, 9.0, n))) for n in (10, 100))
    assert many < few / 2
    assert many < 2.5 * floor()


def test_ddpm_takes_guidance_too():
    assert distance(run(samplers.ddpm, linspace(log_snr("cosine").clamp(min=-9), 250))) < 3 * floor()


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


def test_a_scale_may_depend_on_the_noise():
    world, x = Mixture(), torch.tensor([[0.2, -0.1]], dtype=torch.float64)
    guided = score_shift(world.log_prob(0), guidance_interval(-1.0, 1.0, 2.0))(world.denoise)
    for lam in (-3.0, 0.5, 3.0):
        level = torch.tensor([lam], dtype=torch.float64)
        wanted = score_shift(world.log_prob(0), 2.0)(world.denoise) if abs(lam) < 1 else world.denoise
        torch.testing.assert_close(guided(x, level).x0, wanted(x, level).x0)


def conditional(label):
    """The exact denoiser of one class: its mode is a Gaussian."""
    world = Mixture()

    def denoise(x, lam):
        lam = lam.double().expand(len(x))
        a, s = alpha(lam)[:, None], sigma(lam)[:, None]
        gain = a * world.std**2 / (a**2 * world.std**2 + s**2)
        return from_x0(x, world.means[label] + gain * (x - a * world.means[label]), lam)

    return denoise


def test_classifier_free_guidance_is_guidance_by_the_exact_classifier():
    """Bayes: the difference of the conditional and the unconditional score is the classifier's."""
    world, lam = Mixture(), torch.tensor([0.3, -1.0], dtype=torch.float64)
    x = torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    free = classifier_free(world.denoise, 1.8)(conditional(2))(x, lam)
    torch.testing.assert_close(free.x0, score_shift(world.log_prob(2), 1.8)(world.denoise)(x, lam).x0)
    assert classifier_free(world.denoise, 1.0)(world.denoise) == world.denoise
    plain = conditional(2)
    assert classifier_free(world.denoise, 0.0)(plain) == world.denoise
    assert classifier_free(world.denoise, 1.0)(plain) is plain


def test_rescaling_keeps_the_spread():
    lam = torch.tensor([0.0])
    x, wild = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)

    def plain(x, lam):
        return from_x0(x, x.clone(), lam)

    other = lambda x, lam: from_x0(x, wild, lam)  # noqa: E731
    found = classifier_free(other, 5.0, rescale=1.0)(plain)(x, lam).x0
    torch.testing.assert_close(found.flatten(1).std(1), x.flatten(1).std(1))


def test_a_reference_gives_the_coarse_shape_and_nothing_else():
    torch.manual_seed(0)
    reference, x = torch.randn(1, 3, 8, 8), torch.randn(2, 3, 8, 8)

    def plain(x, lam):
        return from_x0(x, x.clone(), lam)

    found = ilvr(reference, 4)(plain)(x, torch.tensor(-2.0)).x0
    pooled = F.avg_pool2d(found, 4)
    torch.testing.assert_close(pooled, F.avg_pool2d(reference, 4).expand_as(pooled))
    fine = x - F.interpolate(F.avg_pool2d(x, 4), scale_factor=4)
    torch.testing.assert_close(found - F.interpolate(pooled, scale_factor=4), fine)
    late = ilvr(reference, 4, until=0.0)(plain)(x, torch.tensor(1.0)).x0
    assert late.equal(x)
    with pytest.raises(UsageError, match=r"\[8, 8\] pixels do not divide by 3"):
        ilvr(reference, 3)


@pytest.mark.parametrize("sampler", [samplers.ddim, samplers.dpmpp_2m, samplers.heun, samplers.unipc, samplers.ddpm])
def test_inpainting_keeps_what_is_not_masked(sampler):
    torch.manual_seed(0)
    image, mask = torch.rand(1, 3, 4, 4, dtype=torch.float64), torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1

    def plain(x, lam):
        return from_x0(x, torch.tanh(x), lam.double())

    out = sampler(inpaint(image, mask)(plain), torch.randn(2, 3, 4, 4).double(), karras(-5.0, 8.0, 8))
    assert out[..., 2:].equal(image[..., 2:].expand(2, -1, -1, -1))
    assert not out[..., :2].equal(image[..., :2].expand(2, -1, -1, -1))


def test_the_mean_shift_moves_the_mean_of_a_ddpm_step_by_its_variance_times_the_gradient(monkeypatch):
    """ADM's rule, mu + w Sigma g, step by step, without the noise."""
    monkeypatch.setattr(samplers, "_noise", lambda x, generator: torch.zeros_like(x))
    world, lambdas = Mixture(), torch.linspace(-4, 3, 6, dtype=torch.float64)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoise = mean_shift(world.log_prob(1), 0.8, lambdas)(world.denoise)
    for here, there in itertools.pairwise(lambdas):
        levels = torch.stack([here, there])
        (a, a_next), (s, s_next) = alpha(levels), sigma(levels)
        variance = (1 - (a * s_next / (s * a_next)) ** 2) * s_next**2
        # Two levels: one step, and the jump to x0 that ends every walk; so x after the step is found from the first.
        seen = []

        def look(x, lam, seen=seen):
            seen.append(x)
            return denoise(x, lam)

        samplers.ddpm(look, x, levels)
        guided = seen[1]
        seen.clear()
        samplers.ddpm(lambda x, lam, seen=seen: (seen.append(x), world.denoise(x, lam))[1], x, levels)
        plain = seen[1]
        torch.testing.assert_close(guided - plain, 0.8 * variance * gradient(world.log_prob(1), x, here.expand(5)))


def test_the_mean_shift_under_guides_when_steps_are_few():
    def found(guider, steps):
        world, lambdas = Mixture(), karras(-9.0, 9.0, steps)
        x = torch.randn(N, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return distance(samplers.ddim(guider(world, lambdas)(world.denoise), x, lambdas))

    def score(world, lambdas):
        return score_shift(world.log_prob(1), 1.0)

    def mean(world, lambdas):
        return mean_shift(world.log_prob(1), 1.0, lambdas)

    assert found(mean, 10) > 2 * found(score, 10)
    assert found(mean, 100) < found(mean, 25) < found(mean, 10)


def test_through_x0_is_worse_than_noise_aware_however_many_steps():
    """The un-noised classifier on x0, through the denoiser: DESIGN.md section 3's table."""
    world, lambdas = Mixture(), karras(-9.0, 9.0, 50)
    x = torch.randn(N, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def clean(x0):
        return world.log_prob(1)(x0, torch.full((len(x0),), torch.inf))

    assert distance(samplers.dpmpp_2m(through_x0(clean, 1.0)(world.denoise), x, lambdas)) > 5 * floor()


def test_through_x0_goes_back_through_the_denoiser():
    world, lam = Mixture(), torch.tensor([0.3, -1.0], dtype=torch.float64)
    x = torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    guided = through_x0(lambda x0: -(x0**2).sum(dim=1), 0.7)(world.denoise)(x, lam)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one, at: world.denoise(one[None], at[None]).x0[0]))(x, lam)
    x0 = world.denoise(x, lam).x0
    g = -2 * (x0[:, None] @ jacobian)[:, 0]
    a, s = alpha(lam)[:, None], sigma(lam)[:, None]
    torch.testing.assert_close(guided.x0, x0 + 0.7 * s**2 / a * g)


def test_cutouts_are_squares_of_the_picture_and_repeat_with_the_seed():
    seen = []

    def log_prob(x0):
        seen.append(x0)
        return x0.flatten(1).sum(dim=1)

    def plain(x, lam):
        return from_x0(x, x * 1.0, lam)

    x, lam = torch.rand(2, 3, 16, 16), torch.zeros(2)
    results = [through_x0(log_prob, 1.0, cutouts=5, seed=seed)(plain)(x, lam).x0 for seed in (0, 0, 1)]
    assert len(seen) == 15
    assert {view.shape for view in seen} == {(2, 3, 16, 16)}
    assert x.min() <= min(view.min() for view in seen)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_cfg_plus_plus_is_the_papers_step():
    """x0 interpolated, noise of the unconditional: algorithm 2, one DDIM step."""
    world, levels = Mixture(), torch.tensor([-0.5, 1.0], dtype=torch.float64)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = []

    def watched(x, lam):
        seen.append(x)
        return classifier_free(world.denoise, 0.6, renoise=True)(conditional(2))(x, lam)

    samplers.ddim(watched, x, levels)
    lam = levels[:1].expand(4)
    plain, told = world.denoise(x, lam), conditional(2)(x, lam)
    (_, a), (_, s) = alpha(levels), sigma(levels)
    torch.testing.assert_close(seen[1], a * (plain.x0 + 0.6 * (told.x0 - plain.x0)) + s * plain.eps)


def test_clipping_keeps_a_pair_consistent_and_another_noise_as_it_was():
    x, lam = torch.tensor([[2.0, 0.1]]), torch.tensor([0.3])
    x0 = torch.tensor([[1.7, 0.2]])
    pair = clipped(lambda x, lam: from_x0(x, x0, lam))(x, lam)
    torch.testing.assert_close(pair.eps, from_x0(x, x0.clamp(-1, 1), lam).eps)
    within, noise = x0.clamp(-1, 1), torch.tensor([[0.4, 0.5]])
    assert torch.equal(clipped(lambda x, lam: Prediction(within, noise))(x, lam).eps, noise)


def test_several_denoisers_mix_by_their_weights():
    lam = torch.tensor([0.3, -1.0], dtype=torch.float64)
    x = torch.randn(2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    both = compose({conditional(0): 3.0, conditional(1): 1.0})(x, lam)
    torch.testing.assert_close(both.x0, 0.75 * conditional(0)(x, lam).x0 + 0.25 * conditional(1)(x, lam).x0)
    one = conditional(0)
    assert compose({one: 2.0}) is one

    def with_variance(x, lam):
        return conditional(0)(x, lam)._replace(v=torch.full_like(x, 0.3))

    assert (compose({with_variance: 1.0, conditional(1): 1.0})(x, lam).v == 0.3).all()
    with pytest.raises(UsageError, match="add up to 0"):
        compose({conditional(0): 1.0, conditional(1): -1.0})


@pytest.mark.parametrize("weights", [(1.0, -1.0), (0.5, -1.0), (-1.0, -1.0), (0.0, 0.0), (1.0, float("inf"))])
def test_weights_whose_sum_is_not_above_zero_would_draw_what_is_to_be_avoided(weights):
    with pytest.raises(UsageError, match="must be above 0 and finite"):
        compose(dict(zip((conditional(0), conditional(1)), weights, strict=True)))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_that_is_not_finite_is_refused(scale):
    world, x, lam = Mixture(), torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    for made in (scale, lambda level: scale):
        for guider in (score_shift(world.log_prob(0), made), classifier_free(conditional(0), made)):
            with pytest.raises(UsageError, match="must be a finite number"):
                guider(world.denoise)(x, lam)


@pytest.mark.parametrize("ends", [(5.0, -5.0), (float("nan"), 1.0), (1.0, float("nan"))])
def test_an_empty_interval_is_refused(ends):
    with pytest.raises(UsageError, match="is empty"):
        guidance_interval(*ends, 1.0)


@pytest.mark.parametrize("sampler", [samplers.ddim, samplers.heun, samplers.unipc, samplers.dpmpp_2m_sde])
def test_guided_sampling_may_begin_at_pure_noise(sampler):
    """There a gradient knows nothing of the image, and s^2 / a is infinite."""
    zero = torch.cat([torch.tensor([-torch.inf], dtype=torch.float64), karras(-9.0, 9.0, 40)])
    assert distance(run(sampler, zero)) < 3 * floor()
    world, lam = Mixture(), torch.tensor([-torch.inf], dtype=torch.float64)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for guider in (
        score_shift(world.log_prob(1), 2.0),
        mean_shift(world.log_prob(1), 2.0, zero),
        through_x0(lambda x0: -(x0**2).sum(dim=1), 1.0),
    ):
        assert torch.equal(guider(world.denoise)(x, lam).x0, world.denoise(x, lam).x0)
