"""The noise-aware classifier, for classifier guidance: an image encoder and a learned vector for each class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipkit.guidance.guiders import LogProb
from clipkit.guidance.networks.noisy_clip import NoisyCLIP


class NoisyClassifier(nn.Module):
    """x_t and lambda -> log p(class | x_t): softmax over tau(lambda) <f(x_t, lambda), g_class>.

    The guide of ADM (Dhariwal & Nichol 2021, arXiv 2105.05233, section 4), for continuous lambda.
    """

    def __init__(self, tower: NoisyCLIP, classes: int) -> None:
        super().__init__()
        self.tower = tower
        self.classes = nn.Parameter(torch.randn(classes, tower.clip.config.embed_dim))

    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        """[B, 3, S, S] and [B] -> log probabilities [B, classes]."""
        features, tau = self.tower.encode_image(x, lam)
        scores: Tensor = tau[:, None] * features @ F.normalize(self.classes, dim=1).T
        return scores.log_softmax(dim=1)

    def log_prob(self, label: int) -> LogProb:
        """log p(label | x_t), for a guider."""
        return lambda x, lam: self(x, lam)[:, label]
