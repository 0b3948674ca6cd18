"""The training loss on hashtags.

Softmax cross-entropy with target 1/k on each of an image's k tags (Mahajan et al. 2018, arXiv 1805.00932, section 2.2).
Rejected as the default: a sigmoid per tag, which they and others find worse on noisy tags of very unequal frequency.

Shape letters: B batch, V tags.
"""

from torch import Tensor
from torch.nn import functional


def softmax_cross_entropy_multi(logits_BV: Tensor, targets_BV: Tensor) -> Tensor:
    """Mean over the batch of -sum_v target_v log softmax(logits)_v, in float32 whatever autocast says.

    Args:
        logits_BV: [B, V], any floating type.
        targets_BV: float [B, V], rows summing to 1 (1/k on each of k tags).

    Returns:
        A float32 scalar.
    """
    if logits_BV.shape != targets_BV.shape:
        raise ValueError(f"logits {list(logits_BV.shape)} and targets {list(targets_BV.shape)} must have the same shape")
    log_probabilities_BV = functional.log_softmax(logits_BV.float(), dim=1)
    return -(targets_BV.float() * log_probabilities_BV).sum(dim=1).mean()
