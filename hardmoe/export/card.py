"""The model card of an exported mixture: what it is, what it was trained on, how good it is, under which licences its data came.

Everything in it is read from the run; what the run does not know is said to be unknown. Rejected: a template for people to fill
in, which stays as it is.
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from hardmoe.artifacts.store import ArtifactStore
from hardmoe.config import Json
from hardmoe.data.schemas import ORIGIN
from hardmoe.mixture import Mixture
from hardmoe.tables import iterate_table

CARD_BEGINS = "---\nlibrary_name: hardmoe\n"
_COLUMNS = ("precision@1", "precision@5", "recall@10", "hit@5", "map")
_MOST_LICENCES, _MOST_TAGS = 12, 40


def model_card(mixture: Mixture, files: Mapping[str, str]) -> str:
    """The `README.md` of the folder.

    Args:
        mixture: the mixture.
        files: what else is in the folder, each with a few words.
    """
    store = mixture.store
    parts = [_front_matter(), _what(mixture), _use(), _metrics(store), _data(store), _tags(mixture), _files(files), _limits()]
    return "\n".join(part for part in parts if part)


def _front_matter() -> str:
    return (
        f"{CARD_BEGINS}pipeline_tag: image-classification\nlicense: other\n"
        "tags:\n- hashtags\n- mixture-of-experts\n- image-feature-extraction\n---\n"
    )


def _what(mixture: Mixture) -> str:
    router = mixture.router
    sizes = [mixture.artifacts[f"experts/expert-{expert:04d}"].payload for expert in range(mixture.num_experts)]
    trunk = mixture.artifacts["trunk"].payload["parameters"]
    total = sum(each["parameters"] for each in sizes) + trunk
    return (
        f"# A hard mixture of {mixture.num_experts} experts for {len(mixture.tags):,} hashtags\n\n"
        f"A trunk ({mixture.backbone}) embeds an image of {mixture.image_size} pixels, the nearest of "
        f"{len(router.centroids_KD)} centroids sends it to one of {mixture.num_experts} experts, and one decoder over a unified "
        f"space of {mixture.decoder.dim} dimensions gives the probabilities of all hashtags. {total:,} parameters, of which an "
        f"image passes {sizes[0]['parameters'] + trunk:,}. Trained with hardmoe, after Gross, "
        "Ranzato and Szlam, *Hard Mixtures of Experts for Large Scale Weakly Supervised Vision*, CVPR 2017.\n"
    )


def _use() -> str:
    return (
        "## Use\n\n`modeling_hardmoe.py` loads this folder; `pip install torch safetensors numpy pillow` is all that it needs. "
        f"The graphs were written with torch {torch.__version__.partition('+')[0]}; another one may read them too.\n\n"
        '```python\nfrom modeling_hardmoe import Mixture\n\nmixture = Mixture(".")\nprint(mixture.predict(["photo.jpg"], k=5))\n'
        'vectors = mixture.embed(["photo.jpg"])\n```\n'
    )


def _metrics(store: ArtifactStore) -> str:
    evaluation = store.find("evaluation")
    if evaluation is None:
        return "## Metrics\n\nThe run was not evaluated.\n"
    results = json.loads(evaluation.storage.read_bytes(evaluation.path("metrics.json")))
    lines = [f"| system | {' | '.join(_COLUMNS)} |", f"|---|{'---:|' * len(_COLUMNS)}"]
    for system, metrics in results["systems"].items():
        lines.append(f"| {system} | {' | '.join(_interval(metrics[name]) for name in _COLUMNS)} |")
    return (
        f"## Metrics\n\nOn {results['num_test_examples']:,} test examples that no network saw; per cent, with 95 % bootstrap "
        "intervals. `dense_refit` is one network trained on everything with as many examples seen.\n\n" + "\n".join(lines) + "\n"
    )


def _interval(metric: Mapping[str, Json]) -> str:
    if metric["value"] is None:
        return "-"
    value = f"{100 * metric['value']:.1f}"
    return value if metric["low"] is None else f"{value} [{100 * metric['low']:.1f}, {100 * metric['high']:.1f}]"


def _data(store: ArtifactStore) -> str:
    dataset = store.find("dataset")
    if dataset is None:
        return "## Data\n\nThe run's dataset is not there any more.\n"
    told: Any = dataset.payload
    sizes = ", ".join(f"{count:,} {split}" for split, count in told["sizes"].items())
    licences: Counter[str] = Counter()
    for path in dataset.files("origin/"):
        for table in iterate_table(dataset.storage, path, ORIGIN, ["license"], rows=1 << 16):
            licences.update(licence or "unknown" for licence in table.column("license").to_pylist())
    listed = [f"- {licence}: {count:,} images" for licence, count in licences.most_common(_MOST_LICENCES)]
    if len(licences) > _MOST_LICENCES:
        listed.append(f"- {len(licences) - _MOST_LICENCES} more")
    return (
        f"## Data\n\nSource `{told['source']}`: {sizes} images with hashtags, which people chose freely and no one checked. "
        "Licences of the training, validation and test images, as the source states them:\n\n" + "\n".join(listed) + "\n"
    )


def _tags(mixture: Mixture) -> str:
    shown = ", ".join(f"`{tag}`" for tag in mixture.tags[:_MOST_TAGS])
    more = f" and {len(mixture.tags) - _MOST_TAGS:,} more, in `tags.json`" if len(mixture.tags) > _MOST_TAGS else ""
    return f"## Hashtags\n\n{shown}{more}.\n"


def _files(files: Mapping[str, str]) -> str:
    return "## Files\n\n" + "\n".join(f"- `{name}`: {words}" for name, words in files.items()) + "\n"


def _limits() -> str:
    return (
        "## Limits\n\nHashtags say what people wrote about their pictures, not what is on them: probabilities are of that, and "
        "are as biased as the people and the places that the images came from. JPEGs are decoded in full here; where the run let "
        "the decoder scale them down (`decode` in `config.json`), pixels differ by a little.\n"
    )
