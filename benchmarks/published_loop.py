"""PruneNet's training loop as published, written plainly in float32, to measure yopo against.

Every episode copies the model, scores all rows of each layer, draws those that stay, cuts them out
of the copy, and takes the singular values of what is left from a full decomposition (arXiv
2501.15296, and its code in LCS2-IIITD/PruneNet). Nothing here is yopo's. It differs from the
published code in that it works in float32 without autocast, and keeps probabilities away from 0 and
1, where their logarithm would end the training.

Shapes: E episodes, L layers, F rows, D columns, K kept rows, N hidden units of the predictor.
"""

import copy
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy.stats import ks_2samp
from torch import Tensor, nn

PERFECT = 99999.0
"""The reward where the two spectra do not differ at all."""

_MARGIN = torch.finfo(torch.float32).eps


class SparsityPredictor(nn.Module):
    """Tell with which probability each row stays."""

    def __init__(self, columns: int, rows: int) -> None:
        """Draw the initial values from the global generator."""
        super().__init__()
        self.project = nn.Linear(columns, rows)
        self.row_sparsities = nn.Parameter(torch.rand(rows, 1))

    def forward(self, weight_FD: Tensor) -> Tensor:
        """Return keep probabilities `(F,)`, with fresh noise at each call."""
        alpha_F = torch.sigmoid(self.project(weight_FD) @ self.row_sparsities)[:, 0]
        alpha_F = alpha_F.clamp(_MARGIN, 1 - _MARGIN)
        noise_F = torch.rand_like(alpha_F).clamp(_MARGIN, 1 - _MARGIN)
        return torch.sigmoid(
            torch.log(noise_F)
            - torch.log(1 - noise_F)
            + torch.log(alpha_F)
            - torch.log(1 - alpha_F)
        )


@dataclass
class Run:
    """What a training did: kept rows and rewards of each episode and layer, and seconds."""

    kept: list[list[Tensor]] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)
    dense_seconds: float = 0.0
    """Seconds that the singular values of the whole matrices took, once."""


def fit(
    model: nn.Module,
    *,
    ratio: float,
    episodes: int,
    learning_rate: float = 5e-4,
    discount: float = 0.99,
    seed: int = 0,
) -> Run:
    """Train a predictor on an OPT or LLaMA model, which is left as it was."""
    torch.manual_seed(seed)
    run = Run()
    weights = [expand[0].weight for expand, _ in ffn_layers(model)]
    started = time.perf_counter()
    dense = [singular_values(weight_FD) for weight_FD in weights]
    run.dense_seconds = time.perf_counter() - started
    rows, columns = weights[0].shape
    predictor = SparsityPredictor(columns, rows).to(weights[0].device)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=learning_rate)
    for _ in range(episodes):
        states, kept, rewards = draw(model, predictor, dense, ratio)
        for depth, (state_FD, kept_K, reward) in enumerate(zip(states, kept, rewards, strict=True)):
            keep_F = predictor(state_FD)
            loss = -torch.log(keep_F)[kept_K].sum() * (reward * discount**depth)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        run.kept.append([kept_K.cpu() for kept_K in kept])
        run.rewards.append(rewards)
    return run


@torch.no_grad()
def draw(
    model: nn.Module, predictor: nn.Module, dense: list[Tensor], ratio: float
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Return the scored matrix of each layer, the rows drawn from it, and what they earn."""
    pruned = copy.deepcopy(model)
    states, drawn, rewards = [], [], []
    for (expand, contract), dense_S in zip(ffn_layers(pruned), dense, strict=True):
        state_FD = copy.deepcopy(expand[0].weight.detach()).float()
        keep = int((1 - ratio) * len(state_FD))
        kept_K = torch.multinomial(predictor(state_FD), keep, replacement=False).sort().values
        for linear in expand:
            linear.weight.data = linear.weight[kept_K]
            if linear.bias is not None:
                linear.bias.data = linear.bias[kept_K]
        contract.weight.data = contract.weight[:, kept_K]
        states.append(state_FD)
        drawn.append(kept_K)
        rewards.append(reward_of(dense_S, singular_values(expand[0].weight)))
    return states, drawn, rewards


def reward_of(dense_S: Tensor, kept_S: Tensor) -> float:
    """Return one over the Kolmogorov-Smirnov distance of two sets of singular values."""
    ks = float(ks_2samp(dense_S.numpy(), kept_S.numpy()).statistic)
    return 1 / ks if ks > 0 else PERFECT


@torch.no_grad()
def singular_values(weight_FD: Tensor) -> Tensor:
    """Return the singular values, from the decomposition that the published code asks for."""
    _, values_S, _ = torch.svd(weight_FD.float())
    return values_S.cpu()


def ffn_layers(model: Any) -> list[tuple[list[nn.Linear], nn.Linear]]:
    """Return, for each layer, what is cut by rows, the scored matrix first, and what by columns."""
    if hasattr(model.model, "decoder"):
        return [([layer.fc1], layer.fc2) for layer in model.model.decoder.layers]
    ffns = [layer.mlp for layer in model.model.layers]
    return [([ffn.gate_proj, ffn.up_proj], ffn.down_proj) for ffn in ffns]
