"""From cached features to scores of the tags: a network's own decoder, every expert's own, or the shared one.

Scores are log-probabilities, so that they can be compared between examples, as `map` needs.

Shape letters: N examples, D features, V tags.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hardmoe.models.shared_decoder import load_shared_decoder
from hardmoe.stage import InputArtifact
from hardmoe.training.network import load_weights

Scorer = Callable[[NDArray[np.float32], NDArray[np.int64]], NDArray[np.float32]]
"""Takes features float32 [N, D] and experts int64 [N]; gives log-probabilities float32 [N, V]."""


def build_scorer(decoders: Sequence[InputArtifact], shared: bool) -> Scorer:
    """The scorer of one system.

    Args:
        decoders: networks with a decoder of their own, by expert; or the one artifact of a shared decoder.
        shared: which of the two.
    """
    logits = _shared(decoders[0]) if shared else _own(decoders)

    def score(features_ND: NDArray[np.float32], experts_N: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits_NV = logits(torch.from_numpy(features_ND), torch.from_numpy(experts_N))
            scores_NV: NDArray[np.float32] = torch.log_softmax(logits_NV, dim=1).numpy()
        return scores_NV

    return score


def _shared(decoder: InputArtifact) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return load_shared_decoder(decoder)


def _own(networks: Sequence[InputArtifact]) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    heads = [load_weights(network) for network in networks]
    num_tags = len(heads[0]["decoder.bias"])

    def logits(features_ND: torch.Tensor, experts_N: torch.Tensor) -> torch.Tensor:
        logits_NV = torch.empty(len(features_ND), num_tags)
        for expert in torch.unique(experts_N).tolist():
            rows = experts_N == expert
            head = heads[expert]
            logits_NV[rows] = nn.functional.linear(features_ND[rows], head["decoder.weight"], head["decoder.bias"])
        return logits_NV

    return logits
