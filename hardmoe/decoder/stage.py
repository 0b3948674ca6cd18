"""Declaration of the decoder stages: the mixture's, and `dense_refit`, which is the same fit over one network."""

from hardmoe.decoder.config import DecoderConfig
from hardmoe.stage import Resources, Stage


def decoder_stage(
    config: DecoderConfig, experts: int, seed: int, name: str = "decoder", embeddings: str = "embeddings", start: str = "trunk"
) -> Stage:
    """Alignment and shared decoder over the cached embeddings of `experts` networks, beginning at the decoder of `start`."""
    return Stage(
        name=name,
        kind="decoder",
        version=2,
        config={"decoder": config.identity(), "experts": experts, "seed": seed},
        operational={"decoder": config.operational_values()},
        inputs={"embeddings": embeddings, "vocabulary": "vocabulary", "trunk": start},
        work="hardmoe.decoder.work:DecoderWork",
        resources=Resources(config.num_threads, None),
    )
