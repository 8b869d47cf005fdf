import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipkit.config import DataConfig, OptimConfig, RunConfig
from clipkit.errors import RecipeError
from clipkit.guidance.denoiser import (
    Denoiser,
    DiffusionConfig,
    clipped,
    from_output,
    from_x0,
    loss_of,
    loss_weight,
    target,
    variational_loss,
)
from clipkit.guidance.networks.autoencoder import LatentConfig
from clipkit.guidance.networks.condition import ConditionConfig
from clipkit.guidance.networks.dit import DiT, DiTConfig
from clipkit.guidance.networks.unet import UNet, UNetConfig
from clipkit.guidance.schedule import add_noise, later_log_snr, log_snr

SMALL = UNetConfig(image_size=16, channels=16, multipliers=(1, 2), blocks=1)
SMALL_DIT = DiTConfig(image_size=16, width=32, depth=3, heads=2)
UVIT = DiTConfig(image_size=16, width=32, depth=3, heads=2, noise="token")
PLAIN_DIT = DiTConfig(image_size=16, width=32, depth=3, heads=2, long_skips=False)
ADM = UNetConfig(image_size=16, patch_size=1, channels=16, multipliers=(1, 2), blocks=1, resample="residual")
CONFIGS = {"unet": SMALL, "adm": ADM, "both": SMALL_DIT, "dit": PLAIN_DIT, "u-vit": UVIT}


def build(config, *arguments):
    return (UNet if isinstance(config, UNetConfig) else DiT)(config, *arguments)


NETWORKS = pytest.mark.parametrize("make", [lambda c=c: build(c) for c in CONFIGS.values()], ids=CONFIGS)


KINDS = ["eps", "x0", "v", "flow", "edm"]


@pytest.mark.parametrize("kind", KINDS)
@given(st.floats(-9, 9))
def test_parametrisations_round_trip(kind, level):
    x0, eps = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    lam = torch.full((2,), level, dtype=torch.float64)
    found = from_output(kind, target(kind, x0, eps, lam), add_noise(x0, eps, lam), lam)
    torch.testing.assert_close(found.x0, x0, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.eps, eps, rtol=1e-6, atol=1e-7)


def test_noising_composes():
    """q(x_t | x_s) q(x_s | x_0) = q(x_t | x_0): means and variances multiply out."""
    late, early = torch.tensor([-2.0]).double(), torch.tensor([1.0]).double()
    one = torch.ones(1, 1).double()
    a_early, a_late = (float(add_noise(one, 0 * one, lam)) for lam in (early, late))
    s_early, s_late = (float(add_noise(0 * one, one, lam)) for lam in (early, late))
    ratio = a_late / a_early
    assert s_late**2 == pytest.approx(ratio**2 * s_early**2 + (1 - ratio**2))


@NETWORKS
def test_network_keeps_shape_and_starts_at_zero(make):
    network = make()
    out = network(torch.randn(2, 3, 16, 16), torch.tensor([-3.0, 4.0]))
    assert out.shape == (2, 3, 16, 16)
    assert not out.any()


@NETWORKS
def test_network_hears_the_noise_level_and_sees_everything(make):
    network = make()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    out = network(x, torch.tensor([0.0]))
    assert not torch.allclose(out, network(x, torch.tensor([2.0])))
    out[0, 0, 0, 0].backward()
    assert (x.grad.abs().sum((0, 1)) > 0).all()


@NETWORKS
def test_every_parameter_learns(make):
    network = make()
    for _ in range(3):  # heads and gates start at zero: what is before them learns some steps later
        loss = (network(torch.randn(2, 3, 16, 16), torch.zeros(2)) - 1).square().mean()
        network.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in network.parameters():
                p -= 0.1 * p.grad
    loss = (network(torch.randn(2, 3, 16, 16), torch.zeros(2)) - 1).square().mean()
    network.zero_grad()
    loss.backward()
    assert all(p.grad.any() for n, p in network.named_parameters() if "qkv.bias" not in n)


@pytest.mark.parametrize("network", CONFIGS.values(), ids=CONFIGS)
def test_either_network_makes_a_denoiser(network):
    denoiser = Denoiser(network, DiffusionConfig())
    assert denoiser.image_size == 16
    assert denoiser(torch.randn(2, 3, 16, 16), torch.tensor(0.0)).x0.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_range_is_the_schedules_own(schedule):
    low, high = Denoiser(SMALL, DiffusionConfig(schedule)).lambda_range()
    assert -10.1 < low < -9
    assert 9 < high <= 10


def test_clipping_keeps_the_pair_consistent():
    denoiser = Denoiser(SMALL, DiffusionConfig(prediction="x0"))
    torch.nn.init.constant_(denoiser.network.head[2].bias, 3.0)
    x, lam = torch.randn(2, 3, 16, 16), torch.tensor(0.5)
    x0, eps, *_ = clipped(denoiser)(x, lam)
    assert float(x0.detach().max()) == 1.0
    torch.testing.assert_close(
        torch.sigmoid(lam).sqrt() * x0 + torch.sigmoid(-lam).sqrt() * eps, x, rtol=1e-4, atol=1e-5
    )


def test_impossible_shapes_are_refused():
    with pytest.raises(RecipeError, match="does not divide by 8"):
        UNetConfig(image_size=36)
    with pytest.raises(RecipeError, match="multiple of 16"):
        UNetConfig(channels=20)
    with pytest.raises(RecipeError, match="does not divide by patch_size 4"):
        DiTConfig(image_size=30)
    with pytest.raises(RecipeError, match="divide by heads 5"):
        DiTConfig(width=192, heads=5)


@pytest.mark.parametrize("weight", ["min_snr", "p2"])
@given(st.floats(-8, 8))
def test_a_weighting_is_the_same_whatever_is_predicted(weight, level):
    """The same error of x0 costs the same."""
    generator = torch.Generator().manual_seed(0)
    x0, wrong, x = (torch.randn(1, 3, 4, 4, generator=generator).double() for _ in range(3))
    lam = torch.tensor([level], dtype=torch.float64)
    costs = []
    for kind in KINDS:
        pair = [from_x0(x, image, lam) for image in (x0, wrong)]
        outputs = [target(kind, p.x0, p.eps, lam) for p in pair]
        config = DiffusionConfig(prediction=kind, weight=weight)
        costs.append(float(loss_of(config, outputs[1], outputs[0], lam)))
    assert costs == pytest.approx([costs[0]] * len(KINDS), rel=1e-6)


def test_weights_are_the_papers():
    lam = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    snr = lam.exp()
    weights = {
        (kind, weight): loss_weight(DiffusionConfig(prediction=kind, weight=weight), lam)
        for kind in ("eps", "v") for weight in ("min_snr", "p2", "simple")
    }  # fmt: skip
    torch.testing.assert_close(weights["eps", "min_snr"], snr.clamp(max=5) / snr)
    torch.testing.assert_close(weights["v", "min_snr"], snr.clamp(max=5) / (snr + 1))
    torch.testing.assert_close(weights["eps", "p2"], 1 / (1 + snr))
    assert weights["v", "simple"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(("loss", "expected"), [("l2", 4.0), ("l1", 2.0), ("huber", 1.5)])
def test_distances(loss, expected):
    output = torch.full((2, 3, 2, 2), 2.0)
    found = loss_of(DiffusionConfig(loss=loss), output, torch.zeros_like(output), torch.zeros(2))
    assert found.tolist() == [expected, expected]


def test_edm_preconditioning_is_the_papers():
    """Table 1 of Karras et al. 2022: c_in, c_skip and c_out at sigma, for x / a."""
    model = Denoiser(SMALL, DiffusionConfig(prediction="edm"))
    seen = []
    model.network.forward = lambda x, lam: seen.append(x) or torch.full_like(x, 0.3)
    sigma, data = 0.8, 0.5
    lam = torch.tensor([-2 * math.log(sigma)])
    a = 1 / (1 + sigma**2) ** 0.5
    x = torch.randn(1, 3, 16, 16)
    found = model(x, lam)
    c_in, norm = 1 / (sigma**2 + data**2) ** 0.5, sigma**2 + data**2
    torch.testing.assert_close(seen[0], c_in * x / a)
    wanted = data**2 / norm * x / a + sigma * data / norm**0.5 * 0.3
    torch.testing.assert_close(found.x0, wanted)


def parameters(network):
    return sum(p.numel() for p in network.parameters()) / 1e6


@pytest.mark.parametrize(
    ("shape", "published"), [((384, 12, 6), 33), ((768, 12, 12), 130), ((1024, 24, 16), 458), ((1152, 28, 16), 675)]
)
def test_dits_have_the_published_numbers_of_parameters(shape, published):
    """Peebles & Xie 2022, table 4: S, B, L and XL with patches of 2 on latents of 32 x 32 x 4, 1000 classes."""
    with torch.device("meta"):
        network = DiT(DiTConfig(32, 2, *shape, long_skips=False), channels=4, condition_width=shape[0])
        classes = torch.nn.Embedding(1001, shape[0])
    assert parameters(network) + parameters(classes) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("size", "patch", "shape", "published"), [(32, 2, (512, 13, 8), 44), (64, 4, (768, 17, 12), 131)]
)
def test_u_vits_have_the_published_numbers_of_parameters(size, patch, shape, published):
    """Bao et al. 2022, table 1: S on CIFAR-10, M on ImageNet 64 x 64."""
    with torch.device("meta"):
        network = DiT(DiTConfig(size, patch, *shape, noise="token"))
    assert parameters(network) == pytest.approx(published, rel=0.01)


def test_adm_has_the_published_number_of_parameters():
    """Dhariwal & Nichol 2021, table 4: 296 million for ImageNet 64 x 64."""
    config = UNetConfig(64, 1, 192, (1, 2, 3, 4), 3, 1, head_channels=64, resample="residual")
    with torch.device("meta"):
        network, classes = UNet(config, condition_width=768), torch.nn.Embedding(1001, 768)
    assert parameters(network) + parameters(classes) == pytest.approx(296, rel=0.01)


@pytest.mark.parametrize("config", [SMALL, SMALL_DIT, UVIT], ids=["unet", "both", "u-vit"])
def test_checkpointing_changes_nothing_but_memory(config):
    torch.manual_seed(0)
    network, again = build(config), build(dataclasses.replace(config, grad_checkpointing=True))
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    again.load_state_dict(network.state_dict())
    x, lam = torch.randn(2, 3, 16, 16), torch.tensor([0.0, 2.0])
    for one in (network, again):
        one(x, lam).square().sum().backward()
    for p, q in zip(network.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_the_bound_is_least_at_the_exact_reverse_variance():
    """Gaussian data: p(x_s | x_t) has variance share s_s^2 + (a_s share)^2 Var[x0 | x_t]."""
    lam, later, std = torch.tensor([0.3]).double(), torch.tensor([0.8]).double(), 0.7
    a, s = torch.sigmoid(lam).sqrt(), torch.sigmoid(-lam).sqrt()
    a_later, s_later = torch.sigmoid(later).sqrt(), torch.sigmoid(-later).sqrt()
    share = 1 - (a * s_later / (s * a_later)) ** 2
    x0 = std * torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = a * x0 + s * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    said = a * std**2 / (a**2 * std**2 + s**2) * x
    left = std**2 * s**2 / (a**2 * std**2 + s**2)
    exact = share * s_later**2 + (a_later * share) ** 2 * left
    fractions = torch.linspace(0, 1, 401).double()
    losses = [float(variational_loss(x0, said, torch.full_like(x0, f), lam, later)) for f in fractions.tolist()]
    best = float(fractions[losses.index(min(losses))])
    log_variance = best * torch.log(share * s**2) + (1 - best) * torch.log(share * s_later**2)
    assert float(log_variance.exp()) == pytest.approx(float(exact), rel=0.01)
    assert float(variational_loss(x0, x0, torch.zeros_like(x0), lam, later)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("network", CONFIGS.values(), ids=CONFIGS)
def test_a_learned_variance_is_a_second_half_of_the_output(network):
    denoiser = Denoiser(network, DiffusionConfig(variance="learned"))
    x0, eps, v, _ = denoiser(torch.randn(2, 3, 16, 16), torch.tensor(0.0))
    assert x0.shape == eps.shape == v.shape == (2, 3, 16, 16)
    assert (v == 0.5).all()  # untrained: in the middle
    kept = clipped(denoiser)(torch.randn(2, 3, 16, 16), torch.tensor(0.0))
    assert kept.v is not None


EVERY_SCHEDULE = ("linear", "scaled_linear", "cosine", "sigmoid", "flow", "edm")


def hybrid(lam, later, dtype):
    """Losses [B, N], and their gradients to the fraction, of numbers with all errors and fractions in them."""
    generator = torch.Generator().manual_seed(0)
    fraction = torch.linspace(0, 1, 21, dtype=torch.float64).repeat(len(lam), 1).to(dtype).requires_grad_()
    x0 = (2 * torch.rand(fraction.shape, generator=generator, dtype=torch.float64) - 1).to(dtype)
    said = torch.randn(fraction.shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    loss = variational_loss(x0, said, fraction, lam, later)
    loss.sum().backward()
    assert said.grad is None
    assert loss.dtype == dtype
    return loss.detach(), fraction.grad


@pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
def test_the_bound_and_its_gradient_are_finite_at_every_level_in_float32(schedule):
    """From the last level to the first, whose step has no length, and at what float32 makes of both ends."""
    table = log_snr(schedule)
    ends = table[[0, -1]].float()
    near = [table.float(), ends.nextafter(torch.tensor(math.inf)), ends.nextafter(torch.tensor(-math.inf))]
    lam = torch.cat([table[:1], *near])
    later = later_log_snr(schedule, lam)
    (loss, gradient), (exact, exact_gradient) = (hybrid(lam, later, dtype) for dtype in (torch.float32, torch.float64))
    for found, wanted in ((loss, exact), (gradient, exact_gradient)):
        assert found.isfinite().all()
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-7 * float(wanted.abs().max()) + 1e-12)
    assert loss[0] == 0
    assert not gradient[0].any()


def test_the_bound_is_that_of_the_papers_formula():
    lam, later = torch.tensor([-6.0, 0.0, 4.0]).double(), torch.tensor([-5.9, 0.5, 9.0]).double()
    share = 1 - (lam - later).exp()
    least, most = share * torch.sigmoid(-later), share * torch.sigmoid(-lam)
    x0, said, fraction = (torch.rand(3, 1, generator=torch.Generator().manual_seed(s)).double() for s in range(3))
    mean = (torch.sigmoid(later).sqrt() * share)[:, None] * (x0 - said)
    spread = (fraction * most.log()[:, None] + (1 - fraction) * least.log()[:, None]).exp().sqrt()
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mean, least.sqrt()[:, None]), normal(0.0 * mean, spread))
    torch.testing.assert_close(variational_loss(x0, said, fraction, lam, later), exact[:, 0])


def test_the_bound_from_pure_noise():
    """A schedule with zero terminal SNR begins at lambda = -infinity."""
    loss, gradient = hybrid(
        torch.tensor([-math.inf, -math.inf]), torch.tensor([-8.0, -math.inf]).double(), torch.float32
    )
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert loss[1] == 0


@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("schedule", EVERY_SCHEDULE)
def test_a_step_of_the_hybrid_loss_has_finite_gradients_at_both_ends(schedule, prediction, monkeypatch):
    import clipkit.train.denoiser as module
    from clipkit.data.loader import Batch

    class Pack:
        classes = ()

    recipe = module.DenoiserRecipe(
        RunConfig("x", 1), DataConfig("x"), OptimConfig(),
        DiffusionConfig(schedule, prediction, variance="learned"), ConditionConfig(), LatentConfig(), SMALL,
    )  # fmt: skip
    torch.manual_seed(0)
    task = module.Denoising(recipe, Pack())
    table = log_snr(schedule)[[0, 0, 1, 500, -2, -1]].float()
    table[0] = table[0].nextafter(torch.tensor(math.inf))  # as float32 may round the first
    monkeypatch.setattr(module, "sample_log_snr", lambda *_: table)
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    (errors,) = task(Batch(images, [""] * 6, torch.zeros(6, dtype=torch.int64), [""] * 6))
    errors.sum().backward()
    assert errors.isfinite().all()
    assert all(p.grad.isfinite().all() for p in task.parameters() if p.grad is not None)


@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("weight", ["simple", "min_snr", "p2"])
def test_weights_and_targets_are_finite_with_all_noise_and_with_none(prediction, weight):
    lam = torch.tensor([-math.inf, -90.0, 0.0, 90.0, math.inf])
    assert loss_weight(DiffusionConfig(prediction=prediction, weight=weight), lam).isfinite().all()
    x0, eps = torch.randn(2, 5, 3).unbind()
    wanted = target(prediction, x0, eps, lam)
    assert wanted.isfinite().all()
    if prediction in ("v", "flow", "edm"):  # the others cannot know all of it
        said = from_output(prediction, wanted, add_noise(x0, eps, lam), lam)
        torch.testing.assert_close(said.x0, x0, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(said.eps, eps, rtol=1e-4, atol=1e-5)
