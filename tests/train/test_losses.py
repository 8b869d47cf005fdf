from functools import partial

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks

from clipkit import distributed
from clipkit.config import from_dict
from clipkit.errors import RecipeError
from clipkit.registry import LOSSES, Entry
from clipkit.train import losses
from clipkit.train.losses import LossConfig, info_nce, sigmoid_loss


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


def test_label_smoothing_gives_every_pair_a_share_of_the_target():
    """torch's cross_entropy smooths in the same way, over the B logits of a row."""
    image, text, groups = make()
    ours, theirs = leaves(image, text, torch.tensor(9.0).double()), leaves(image, text, torch.tensor(9.0).double())
    same = (groups[:, None] == groups).double()
    logits = theirs[2] * theirs[0] @ theirs[1].T
    columns, rows = (
        F.cross_entropy(x, same / same.sum(1, keepdim=True), label_smoothing=0.3) for x in (logits.T, logits)
    )
    smoothed = info_nce(*ours, groups, label_smoothing=0.3)
    for a, b in zip(gradients(smoothed, *ours), gradients((rows + columns) / 2, *theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_label_smoothing_is_a_share_and_of_info_nce_alone():
    with pytest.raises(RecipeError, match=r"label_smoothing is 1\.0; it must be in"):
        LossConfig(label_smoothing=1.0)
    with pytest.raises(RecipeError, match=r"loss\.kind=sigmoid has no label smoothing"):
        LossConfig(kind="sigmoid", label_smoothing=0.1)


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


def plain_sigmoid(image, text, scale, bias):
    """Zhai et al. 2023, equation 1 and algorithm 1, word for word."""
    labels = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -F.logsigmoid(labels * (scale * image @ text.T + bias)).sum() / len(image)


def test_the_sigmoid_loss_equals_its_formula_with_every_gradient():
    image, text, _ = make()
    start = (image, text, torch.tensor(9.0).double(), torch.tensor(-4.0).double())
    ours, theirs = leaves(*start), leaves(*start)
    for a, b in zip(gradients(sigmoid_loss(*ours), *ours), gradients(plain_sigmoid(*theirs), *theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_sigmoid_loss_equals_open_clips():
    from open_clip.loss import SigLipLoss

    image, text, _ = make()
    scale, bias = torch.tensor(9.0).double(), torch.tensor(-4.0).double()
    torch.testing.assert_close(sigmoid_loss(image, text, scale, bias), SigLipLoss()(image, text, scale, bias))


@pytest.mark.parametrize("strip", [1, 5, 12])
@pytest.mark.parametrize("loss", [info_nce, sigmoid_loss])
@pytest.mark.parametrize("grouped", [False, True])
def test_strips_change_nothing(monkeypatch, strip, loss, grouped):
    """Against autograd through the whole matrix of logits, for several positives and for a scale per image too."""
    image, text, groups = make()
    groups = groups if grouped else torch.arange(12)
    scale, bias = torch.linspace(1, 20, 12).double(), torch.linspace(-3, 1, 12).double()
    ours, theirs = leaves(image, text, scale, bias), leaves(image, text, scale, bias)
    same = (groups[:, None] == groups).double()
    if loss is info_nce:
        ours, theirs = ours[:3], theirs[:3]
        logits = theirs[2][:, None] * (theirs[0] @ theirs[1].T)
        targets = same / same.sum(1, keepdim=True)
        expected = -(targets * (logits.log_softmax(1) + logits.log_softmax(0))).sum() / 24
    else:
        logits = theirs[2][:, None] * (theirs[0] @ theirs[1].T) + theirs[3][:, None]
        expected = -F.logsigmoid((2 * same - 1) * logits).sum() / 12
    monkeypatch.setattr("clipkit.train.losses._STRIP", strip)
    for a, b in zip(gradients(loss(*ours, groups), *ours), gradients(expected, *theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


class _Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """How many elements each tensor has that is made."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple) else (out,)
        self.made.extend(t.numel() for t in made if isinstance(t, torch.Tensor))
        return out


def test_no_matrix_of_logits_is_held():
    """Nothing of B x B elements is ever allocated, forward or backward; strips of the batch are all there is."""
    image, text = (F.normalize(torch.randn(1024, 8), dim=1).requires_grad_() for _ in range(2))
    with _Sizes() as sizes:
        info_nce(image, text, torch.tensor(10.0)).backward()
    assert max(sizes.made) == 128 * 1024


def _largest_tensor(gathered):
    losses.GATHERED = gathered
    image, text = (F.normalize(torch.randn(256, 256), dim=1).requires_grad_() for _ in range(2))
    with _Sizes() as sizes:
        info_nce(image, text, torch.tensor(10.0)).backward()
    return torch.tensor(max(sizes.made))


def _gathers():
    """How often features were gathered for a loss and its gradients."""
    gathered, gather = [], distributed.gather_rows

    def counted(local, sizes):
        gathered.append(local.is_floating_point())
        return gather(local, sizes)

    distributed.gather_rows = counted
    image, text = (F.normalize(torch.randn(6, 8), dim=1).requires_grad_() for _ in range(2))
    info_nce(image, text, torch.tensor(10.0)).backward()
    return torch.tensor(sum(gathered))


def test_features_are_gathered_once():
    assert [int(n) for n in on_ranks(2, _gathers)] == [1, 1]


def test_round_a_ring_no_rank_holds_all_features():
    """Two ranks of 256 x 256 features: a gather makes a tensor of both, the ring none larger than a rank's own."""
    assert [int(n) for n in on_ranks(2, _largest_tensor, 1 << 30)] == [2 * 256 * 256] * 2
    assert [int(n) for n in on_ranks(2, _largest_tensor, 0)] == [256 * 256] * 2


def _rank_share(loss, tensors, groups, bounds, gathered):
    """One rank's part of the batch -> its loss and gradients, as DDP would average them."""
    losses.GATHERED = gathered
    start, stop = bounds[distributed.rank()], bounds[distributed.rank() + 1]
    own = leaves(*(t[start:stop] if t.ndim else t for t in tensors))
    value = loss(*own, None if groups is None else groups[start:stop])
    return [g.detach() for g in gradients(value, *own)]


@pytest.mark.parametrize("gathered", [1 << 30, 0], ids=["gathered", "ring"])
@pytest.mark.parametrize(
    ("bounds", "grouped"),
    [([0, 6, 12], False), ([0, 5, 12], True), ([0, 4, 8, 12], True), ([0, 2, 7, 8, 12], True)],
)
@pytest.mark.parametrize(
    "loss", [info_nce, partial(info_nce, label_smoothing=0.2), sigmoid_loss], ids=["info_nce", "smoothed", "sigmoid"]
)
def test_ranks_give_the_gradients_of_one_process(bounds, grouped, loss, gathered):
    """Uneven shares too; towers, logit scale and bias alike, to 1e-5 in fp32."""
    image, text, groups = make()
    tensors = [image.float(), text.float(), torch.tensor(9.0), torch.tensor(-4.0)][: 3 + (loss is sigmoid_loss)]
    groups = groups if grouped else None
    world = len(bounds) - 1
    whole = leaves(*tensors)
    expected = gradients(loss(*whole, groups), *whole)
    shares = on_ranks(world, _rank_share, loss, tensors, groups, bounds, gathered)
    for k in (0, *range(3, len(expected))):  # the loss, and the gradients of what every rank has
        mean = torch.stack([s[k] for s in shares]).mean()
        torch.testing.assert_close(mean, expected[k].detach(), rtol=1e-5, atol=1e-7)
    for k in (1, 2):  # DDP divides the sum over ranks by their number
        torch.testing.assert_close(torch.cat([s[k] for s in shares]) / world, expected[k], rtol=1e-5, atol=1e-7)


def gathered(image, text, logit_scale):
    """Figure 3 on any number of ranks, by autograd alone: what another package would write."""
    images, texts = distributed.all_gather(image), distributed.all_gather(text)
    start = sum(distributed.batch_sizes(len(image))[: distributed.rank()])
    own = torch.arange(start, start + len(image))
    scale = logit_scale.mean()
    rows = F.cross_entropy(scale * image @ texts.T, own, reduction="none")
    columns = F.cross_entropy(scale * text @ images.T, own, reduction="none")
    return distributed.mean_over_batch(rows, columns) / 2


def gathered_on_a_rank(image, text):
    edges = [0, 5, 12]
    mine = slice(edges[distributed.rank()], edges[distributed.rank() + 1])
    own = leaves(image[mine], text[mine])
    found = gradients(gathered(*own, torch.tensor(9.0).double()), *own)
    return [found[0] / 2, *(gradient / 2 for gradient in found[1:])]  # what DDP does, and the sum below


def test_a_plain_loss_with_gathered_features_is_exact_on_unequal_ranks():
    image, text, _ = make()
    whole = leaves(image, text)
    loss, d_image, d_text = gradients(plain(*whole, torch.tensor(9.0).double()), *whole)
    torch.testing.assert_close(gathered(image, text, torch.tensor(9.0).double()), loss)
    (one, *of_one), (other, *of_other) = on_ranks(2, gathered_on_a_rank, image, text)
    torch.testing.assert_close(one + other, loss)
    for wanted, first, second in zip((d_image, d_text), of_one, of_other, strict=True):
        torch.testing.assert_close(torch.cat([first, second]), wanted)


def test_an_unknown_loss_is_refused():
    with pytest.raises(RecipeError, match=r"loss\.kind is 'info_mce'; did you mean 'info_nce'\?"):
        from_dict(LossConfig, {"kind": "info_mce"}, "loss.")


def test_a_loss_is_refused_options_that_it_does_not_take(monkeypatch):
    monkeypatch.setitem(LOSSES.entries, "gathered", Entry("test_losses:gathered", ""))
    monkeypatch.setattr(Entry, "load", lambda self: gathered)
    assert LossConfig("gathered").takes("logit_bias") is False
    with pytest.raises(RecipeError, match=r"loss\.kind=gathered has one positive per image; omit loss\.positives"):
        LossConfig("gathered", positives="group")
    with pytest.raises(RecipeError, match=r"loss\.kind=gathered has no label smoothing; omit loss\.label_smoothing"):
        LossConfig("gathered", label_smoothing=0.1)
