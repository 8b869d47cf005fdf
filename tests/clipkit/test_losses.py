import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks

from clipkit import distributed
from clipkit.losses import info_nce


def make(n=12, d=16, seed=0):
    torch.manual_seed(seed)
    image, text = (F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1) for _ in range(2))
    return image, text, torch.arange(n) % 4


def plain(image, text, scale):
    """Radford et al. 2021, figure 3, word for word."""
    logits = scale * image @ text.T
    labels = torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def gradients(loss, *tensors):
    return [loss, *torch.autograd.grad(loss, tensors)]


def leaves(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


def test_equals_the_plain_formula_with_every_gradient():
    image, text, _ = make()
    ours, theirs = leaves(image, text, torch.tensor(9.0).double()), leaves(image, text, torch.tensor(9.0).double())
    for a, b in zip(gradients(info_nce(*ours), *ours), gradients(plain(*theirs), *theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_groups_of_one_change_nothing():
    image, text, _ = make()
    scale = torch.tensor(9.0).double()
    torch.testing.assert_close(info_nce(image, text, scale, torch.arange(12)), info_nce(image, text, scale))


def test_groups_spread_the_target_over_all_positives():
    image, text, groups = make()
    logits = 9 * image @ text.T
    same = (groups[:, None] == groups).double()
    rows = -(same * logits.log_softmax(1)).sum(1) / same.sum(1)
    columns = -(same * logits.T.log_softmax(1)).sum(1) / same.sum(1)
    torch.testing.assert_close(info_nce(image, text, torch.tensor(9.0), groups), (rows + columns).mean() / 2)


def test_interchangeable_captions_cost_nothing_when_grouped():
    """Two classes told apart perfectly: grouped loss at its floor (log of the group's size), pairwise loss no lower."""
    features = F.normalize(torch.eye(2).repeat(4, 1), dim=1)
    groups = torch.tensor([0, 1] * 4)
    loss = info_nce(features, features, torch.tensor(50.0), groups)
    assert loss == pytest.approx(torch.log(torch.tensor(4.0)).item(), abs=1e-5)


def test_a_scale_per_image():
    image, text, _ = make()
    tau = torch.linspace(1, 20, 12).double()
    logits = tau[:, None] * (image @ text.T)
    labels = torch.arange(12)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(info_nce(image, text, tau), expected)


def _rank_share(image, text, groups, bounds, grouped):
    """One rank's part of the batch -> its loss and gradients, as DDP would average them."""
    start, stop = bounds[distributed.rank()], bounds[distributed.rank() + 1]
    tensors = leaves(image[start:stop], text[start:stop], torch.tensor(9.0))
    loss = info_nce(*tensors, groups[start:stop] if grouped else None)
    return [g.detach() for g in gradients(loss, *tensors)]


@pytest.mark.parametrize(("bounds", "grouped"), [([0, 6, 12], False), ([0, 5, 12], True), ([0, 4, 8, 12], True)])
def test_ranks_give_the_gradients_of_one_process(bounds, grouped):
    """Uneven shares too; towers and logit scale alike, to 1e-5 in fp32."""
    image, text, groups = make()
    image, text = image.float(), text.float()
    world = len(bounds) - 1
    tensors = leaves(image, text, torch.tensor(9.0))
    expected = gradients(info_nce(*tensors, groups if grouped else None), *tensors)
    shares = on_ranks(world, _rank_share, image, text, groups, bounds, grouped)
    loss = torch.stack([s[0] for s in shares]).mean()
    scale = torch.stack([s[3] for s in shares]).mean()
    torch.testing.assert_close(loss, expected[0].detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(scale, expected[3], rtol=1e-5, atol=1e-7)
    for k in (1, 2):  # DDP divides the sum over ranks by their number
        torch.testing.assert_close(torch.cat([s[k] for s in shares]) / world, expected[k], rtol=1e-5, atol=1e-7)
