"""The auxiliary losses that keep a router from sending everything to a few experts.

    importance  (std(I) / mean(I))^2 of I_e = sum over the items of gate e           Shazeer et al. 2017; population std, to E - 1
    load        the same of the probability that noise makes e one of the k best     Riquelme et al., arXiv 2106.05974, appendix A
    gshard      E^2 * mean over e of (share of first choices * mean gate)            Lepikhin et al. 2020
    unbiased    importance with the unbiased variance of the chosen weights, 0 to E  Pavlitskaya et al., arXiv 2204.10598
    kl          KL(I / sum(I) || uniform) of the chosen weights, 0 to log E          the same

Each is computed per group and averaged over the groups; items that fill up a group do not count. A loss whose weight is 0 is left
out and not multiplied by 0, which would let an infinity in.

Shape letters: G groups, S items, E experts, k choices.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

_LEAST = 1e-10


def importance_loss(gates_GSE: Tensor, valid_GS: Tensor) -> Tensor:
    """Squared coefficient of variation of the experts' summed gates."""
    return _squared_variation((gates_GSE * valid_GS[..., None]).sum(1)).mean()


def load_loss(clean_GSE: Tensor, noisy_GSE: Tensor, deviation: float, k: int, valid_GS: Tensor) -> Tensor:
    """Squared coefficient of variation of how probably each expert is among an item's k best under another draw of its noise.

    Args:
        clean_GSE: logits without noise.
        noisy_GSE: logits with it; the k-th largest of them is what an expert has to reach.
        deviation: of the noise; above 0.
        k: experts of each item.
        valid_GS: which items count.
    """
    threshold_GS1 = noisy_GSE.topk(k, dim=-1).values[..., -1:]
    probability_GSE = 1 - torch.special.ndtr((threshold_GS1 - clean_GSE) / deviation)
    counts_G1 = valid_GS.sum(1, keepdim=True).clamp(min=1)
    return _squared_variation((probability_GSE * valid_GS[..., None]).sum(1) / counts_G1).mean()


def gshard_loss(gates_GSE: Tensor, valid_GS: Tensor) -> Tensor:
    """E^2 times the mean of share of first choices times mean gate; 1 where both are even."""
    num_experts = gates_GSE.shape[-1]
    first_GSE = torch.nn.functional.one_hot(gates_GSE.argmax(-1), num_experts) * valid_GS[..., None]
    counts_G1 = valid_GS.sum(1, keepdim=True).clamp(min=1)
    shares_GE, gates_GE = first_GSE.sum(1) / counts_G1, (gates_GSE * valid_GS[..., None]).sum(1) / counts_G1
    return (num_experts**2 * (shares_GE * gates_GE).mean(-1)).mean()


def unbiased_importance_loss(weights_GSE: Tensor) -> Tensor:
    """Unbiased variance of the experts' summed weights over their squared mean; weights of what was not chosen are 0."""
    importance_GE = weights_GSE.sum(1)
    return (importance_GE.var(-1) / (importance_GE.mean(-1) ** 2 + _LEAST)).mean()


def divergence_loss(weights_GSE: Tensor) -> Tensor:
    """KL divergence of the experts' shares of all weights from the uniform distribution."""
    importance_GE = weights_GSE.sum(1) + _LEAST
    shares_GE = importance_GE / importance_GE.sum(-1, keepdim=True)
    return (shares_GE * (shares_GE * shares_GE.shape[-1]).log()).sum(-1).mean()


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor | None:
    """The losses that have a weight other than 0, added up; None if there are none."""
    terms = [weights[name] * loss for name, loss in losses.items() if weights.get(name, 0.0) != 0.0]
    return torch.stack(terms).sum() if terms else None


def _squared_variation(totals_GE: Tensor) -> Tensor:
    return totals_GE.var(-1, unbiased=False) / totals_GE.mean(-1) ** 2
