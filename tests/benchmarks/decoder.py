"""How fast the shared decoder is fitted, beside a plain torch loop, beside running the experts anew, and beside the arithmetic.

    python tests/benchmarks/decoder.py [--tags 2000 20000 1000000] [--rounds 3] [--threads 2]

Cached embeddings of 512 dimensions from eight experts, batches of 512, an affine alignment into as many dimensions, one to three
hashtags an image, drawn like 1 / rank. A step is whatever the `decoder` stage does for one: order, labels, alignment, loss,
gradients, AdamW; `fit` itself is run and not a copy of it. The floor is the least arithmetic of a step: three products of the
decoder (logits, gradient of the weights, of the points) and two of the alignment (the points, the gradient of the maps), and
nothing else, as torch computes them into memory that is there. The plain loop is what one would write: `nn.Linear`, a stack of
alignments, `cross_entropy` with dense targets, `torch.optim.AdamW`. The naive way runs a ResNet-18 over 64-pixel images for
every example of every epoch, before the same step. Rounds are interleaved, and every ratio is one of a round.
"""

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from hardmoe.decoder.config import DecoderConfig
from hardmoe.decoder.embeddings import EmbeddingSet
from hardmoe.decoder.fit import fit
from hardmoe.models.backbones import build_backbone
from hardmoe.models.shared_decoder import SharedDecoder

DIM, EXPERTS, BATCH = 512, 8, 512
_DENSE_TAGS = 100_000
"""Beyond, the plain loop's dense targets and logits of all hashtags would not fit."""


def embeddings(num_examples: int, num_tags: int) -> EmbeddingSet:
    """Random cached embeddings."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 4, num_examples)
    # 1 / rank, without a table: the exponential of a uniform number.
    labels = [np.unique((num_tags ** rng.random(length)).astype(np.int32) - 1) for length in lengths]
    return EmbeddingSet.from_rows(
        rng.integers(0, 256, (num_examples, 16), np.uint8),
        rng.standard_normal((num_examples, DIM), np.float32).astype(np.float16),
        rng.integers(0, EXPERTS, num_examples).astype(np.int32),
        np.concatenate(labels),
        np.cumsum([0, *map(len, labels)]).astype(np.int64),
    )


def start(num_tags: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A decoder to begin with."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_tags, DIM, generator=generator) * 0.02, torch.zeros(num_tags)


def run_ours(examples: EmbeddingSet, num_tags: int, classes: str, threads: int) -> float:
    """Examples/s of an epoch of the stage's own fit, from the second step on."""
    model = SharedDecoder.initial(EXPERTS, DIM, *start(num_tags), seed=0)
    config = DecoderConfig(epochs=1, batch_size=BATCH, classes=classes, num_threads=threads)
    moments = list[float]()
    objective = _Clock(moments)
    fit(model, examples, None, config, 0, objective.sinks())
    return BATCH * (len(moments) - 1) / (moments[-1] - moments[0])


class _Clock:
    """Writes down when each step ended."""

    def __init__(self, moments: list[float]) -> None:
        self._moments = moments

    def sinks(self):
        from hardmoe.training.reporting import TrainingSinks

        return TrainingSinks(progress=lambda _: self._moments.append(time.perf_counter()))


def run_plain(examples: EmbeddingSet, num_tags: int, expert: Callable[[int], None] | None = None) -> float:
    """Examples/s of the plain loop; with an expert to be run before every step."""
    torch.manual_seed(0)
    align = nn.Parameter(torch.eye(DIM).repeat(EXPERTS, 1, 1))
    decoder = nn.Linear(DIM, num_tags)
    optimizer = torch.optim.AdamW([align, *decoder.parameters()], lr=3e-3, weight_decay=0.0)
    features, experts = torch.from_numpy(examples.embeddings_NE), torch.from_numpy(examples.experts_N).long()
    order, moments = torch.randperm(len(examples)), list[float]()
    for rows in order.split(BATCH):
        if expert is not None:
            expert(len(rows))
        targets = torch.zeros(len(rows), num_tags)
        for row, example in enumerate(rows.tolist()):
            tags = examples.label_indices_L[examples.label_offsets[example] : examples.label_offsets[example + 1]]
            targets[row, torch.from_numpy(tags).long()] = 1 / len(tags)
        hidden, of = features[rows].float(), experts[rows]
        unified = torch.empty_like(hidden)
        for index in range(EXPERTS):
            unified[of == index] = hidden[of == index] @ align[index].T
        loss = functional.cross_entropy(decoder(unified), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moments.append(time.perf_counter())
    return BATCH * (len(moments) - 1) / (moments[-1] - moments[0])


def run_floor(num_tags: int, steps: int) -> float:
    """Examples/s if a step were its matrix products."""
    points, errors = torch.randn(BATCH, DIM), torch.randn(BATCH, min(num_tags, _DENSE_TAGS))
    weight, out_points = torch.randn(errors.shape[1], DIM), torch.empty(BATCH, DIM)
    out_errors, out_weight = torch.empty_like(errors), torch.empty_like(weight)
    square, out_square = torch.randn(DIM, DIM), torch.empty(DIM, DIM)

    def decoder() -> None:
        torch.mm(points, weight.T, out=out_errors)
        torch.mm(errors, weight, out=out_points)
        torch.mm(errors.T, points, out=out_weight)

    def alignment() -> None:
        for some in points.split(BATCH // EXPERTS):
            torch.mm(some, square, out=out_points[: len(some)])
            torch.mm(some.T, some, out=out_square)

    # A million hashtags' products are those of as many slices as fit.
    seconds = _timed(decoder, steps) * num_tags / errors.shape[1] + _timed(alignment, steps)
    return BATCH / seconds


def _timed(step: Callable[[], None], steps: int) -> float:
    step()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - began) / steps


def resnet() -> Callable[[int], None]:
    """Runs an expert over as many images."""
    network = build_backbone("resnet18", image_size=64, seed=0).eval()
    images = torch.randn(64, 3, 64, 64)

    def run(count: int) -> None:
        with torch.inference_mode():
            for _ in range(-(-count // len(images))):
                network(images)

    return run


def measure(num_tags: int, options: argparse.Namespace) -> None:
    """Print the rows of one vocabulary."""
    steps = max(3, min(40, 400_000 // num_tags))
    examples = embeddings((steps + 1) * BATCH, num_tags)
    few = examples.take(np.arange(2 * BATCH))
    systems: dict[str, Callable[[], float]] = {"products alone: the floor": lambda: run_floor(num_tags, steps)}
    for classes in ("full", "sharded", "sampled"):
        if classes != "full" or num_tags <= _DENSE_TAGS:
            systems[f"hardmoe, classes: {classes}"] = lambda classes=classes: run_ours(
                examples, num_tags, classes, options.threads
            )
    if num_tags <= _DENSE_TAGS:
        systems["plain torch loop"] = lambda: run_plain(examples, num_tags)
        expert = resnet()
        systems["experts run anew (ResNet-18, 64 px)"] = lambda: run_plain(few, num_tags, expert)
    rates: dict[str, list[float]] = {name: [] for name in systems}
    for number in range(options.rounds if num_tags <= _DENSE_TAGS else 1):
        for name, run in systems.items():
            # What takes minutes and differs by a factor of a hundred is measured once.
            if number == 0 or "anew" not in name:
                rates[name].append(run())
    floor = rates["products alone: the floor"]
    for name, found in rates.items():
        ratios = [rate / bound for rate, bound in zip(found, floor, strict=False)]
        spread = f"({min(ratios):.3g} to {max(ratios):.3g})" if len(ratios) > 1 else ""
        rate = statistics.median(found)
        print(
            f"{num_tags:>9,} {name:38} {rate:10,.1f} examples/s  {statistics.median(ratios):.3g} of the floor {spread}",
            flush=True,
        )


def main() -> None:
    """Print a line per vocabulary and system."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tags", type=int, nargs="+", default=[2_000, 20_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    today = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    print(f"{today}, {options.threads} threads, {platform.machine()}, torch {torch.__version__}")
    for num_tags in options.tags:
        measure(num_tags, options)


if __name__ == "__main__":
    main()
