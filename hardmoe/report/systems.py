"""The systems as the pages name and order them."""

from collections.abc import Iterable, Mapping

SYSTEMS = {
    "trunk": "the first network, alone",
    "dense": "one network of all images, trained by the same rules",
    "dense_refit": "dense, decoder refitted: the control",
    "experts_own_decoder": "experts, each with its own decoder",
    "mixture": "experts, one decoder shared by all",
    "distilled": "one network that learnt from the mixture",
    "mixture_topk": "several of the nearest experts, mixed",
    "best_single_expert": "one expert for all images, chosen on validation",
    "oracle_expert": "the best expert of each image, told by its tags",
    "random_partition": "mixture over randomly drawn parts",
}
MIXTURE, CONTROL = "mixture", "dense_refit"
HEADLINE_METRIC = "precision@1"


def ordered(names: Iterable[str], known: Mapping[str, str]) -> list[str]:
    """Known names in their own order, then the others by name."""
    present = set(names)
    return [name for name in known if name in present] + sorted(present - set(known))
