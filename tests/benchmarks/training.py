"""How fast a network is trained, beside a bare loop over one batch, and beside a plain torch `DataLoader` script.

    python tests/benchmarks/training.py [--backbone quicknet_w24] [--sizes 32 64] [--rounds 5] [--steps 24]

The ceiling is a loop that has one batch of decoded images on the device and does nothing but augment it (crop and flip, with our
own function, as torchvision's draws one crop for a whole batch), normalise, forward, loss, backward, SGD with momentum. Ours is
`training.loop.train`, which every trunk, expert and dense baseline goes through: batches of a part's decoded images in an order
by hash, sparse targets, a checkpoint every 20 steps, progress after each. The script decodes PNGs in a `DataLoader` with as many
workers as cores, transforms each image with torchvision, and goes through the same network. Icons, batches of 256, 1,000
hashtags. On a GPU, where there is one: bfloat16, ResNet-18 at 64 px and ResNet-50 at 224 px besides.

Rounds are interleaved; the first steps of each, which warm things up, are not counted; every ratio is one of a round.
"""

import argparse
import datetime
import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from hardmoe.data.config import PILLOW_MAX_PIXELS, DatasetConfig
from hardmoe.data.loader import EncodedBatch, ExampleSet
from hardmoe.data.sources.base import RawExample
from hardmoe.data.sources.icons import IconsSource
from hardmoe.models.backbones import TagClassifier, build_backbone, normalise_images
from hardmoe.storage import LocalStorage
from hardmoe.training.augment import augment_images
from hardmoe.training.checkpoint import Checkpoints
from hardmoe.training.config import AugmentConfig, TrainingConfig
from hardmoe.training.loop import train
from hardmoe.training.metrics_log import MetricsLog
from hardmoe.training.reporting import TrainingSinks

BATCH, TAGS, WARM = 256, 1_000, 4
CROP = 0.35
CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Case:
    """One network at one size."""

    backbone: str
    image_size: int
    device: torch.device
    steps: int

    @property
    def autocast(self) -> torch.autocast:
        """As the trainer computes."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def network(self) -> TagClassifier:
        """Fresh, on the device, in training mode."""
        backbone = build_backbone(self.backbone, image_size=self.image_size, seed=0)
        model = TagClassifier(backbone, TAGS, seed=0).to(self.device, memory_format=torch.channels_last)
        return model.train()

    def rate(self, moments: list[float]) -> float:
        """Images/s from the end of the last warm-up step on."""
        return BATCH * (len(moments) - WARM) / (moments[-1] - moments[WARM - 1])


def icons(image_size: int, count: int) -> list[bytes]:
    """PNGs of glyphs, each as often as it takes."""
    source = IconsSource(DatasetConfig(source="icons", icon_size=image_size))
    rows = (row for shard in source.shards() for row in source.read(shard))
    drawn = [row.image for row in islice((row for row in rows if isinstance(row, RawExample)), min(count, 8192))]
    return list(islice(cycle(drawn), count))


def labels(count: int) -> list[list[int]]:
    """One to three hashtags each."""
    rng = np.random.default_rng(0)
    return [sorted(set(rng.integers(0, TAGS, rng.integers(1, 4)).tolist())) for _ in range(count)]


def descend(case: Case, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The bare loop over normalised images and targets."""
    model, moments = case.network(), list[float]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for images, targets in batches:
        optimizer.zero_grad()
        with case.autocast:
            _, logits = model(images)
            loss = -(targets * torch.log_softmax(logits.float(), 1)).sum(1).mean()
        loss.backward()
        optimizer.step()
        _wait(case)
        moments.append(time.perf_counter())
    return case.rate(moments)


def _wait(case: Case) -> None:
    if case.device.type == "cuda":
        torch.cuda.synchronize()


def run_ceiling(case: Case, examples: ExampleSet) -> float:
    """One batch on the device, again and again."""
    positions = np.arange(BATCH)
    images = torch.from_numpy(examples.images_at(positions)).to(case.device)
    targets = examples.targets_at(positions).dense(TAGS, case.device)
    augment = AugmentConfig(crop=CROP, flip=True)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for step in range(WARM + case.steps):
            changed = normalise_images(augment_images(images, augment, 0, step))
            yield changed.contiguous(memory_format=torch.channels_last), targets

    return descend(case, batches())


def run_ours(case: Case, examples: ExampleSet) -> float:
    """The trainer."""
    epochs = -(-(WARM + case.steps) * BATCH // len(examples))
    augment = AugmentConfig(crop=CROP, flip=True)
    config = TrainingConfig(
        epochs=epochs,
        batch_size=BATCH,
        augment=augment,
        num_threads=CORES,
        checkpoint_every_steps=20,
        checkpoint_every_seconds=None,
    )
    moments = list[float]()

    def tell(_: object) -> None:
        _wait(case)
        moments.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as directory:
        sinks = TrainingSinks(Checkpoints(LocalStorage(Path(directory)), "checkpoints"), MetricsLog(), tell)
        train(case.network(), examples, config, seed=0, devices=[case.device], sinks=sinks)
    return case.rate(moments)


class _Pictures(Dataset):
    """What a script has: files, and a transform for each."""

    def __init__(self, pictures: list[bytes], tags: list[list[int]], image_size: int) -> None:
        from torchvision.transforms import v2

        self._pictures, self._tags = pictures, tags
        self._transform = v2.Compose(
            [
                v2.RandomResizedCrop(image_size, (CROP, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize([0.5] * 3, [0.25] * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        targets = torch.zeros(TAGS)
        targets[self._tags[index]] = 1 / len(self._tags[index])
        return self._transform(Image.open(io.BytesIO(self._pictures[index])).convert("RGB")), targets


def run_script(case: Case, pictures: list[bytes], tags: list[list[int]]) -> float:
    """A `DataLoader` and the bare loop."""
    loader = DataLoader(
        _Pictures(pictures, tags, case.image_size),
        BATCH,
        shuffle=True,
        num_workers=CORES,
        drop_last=True,
        pin_memory=case.device.type == "cuda",
        persistent_workers=True,
    )

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        endless = (batch for _ in iter(int, 1) for batch in loader)
        for images, targets in islice(endless, WARM + case.steps):
            on_device = images.to(case.device, non_blocking=True)
            yield on_device.contiguous(memory_format=torch.channels_last), targets.to(case.device, non_blocking=True)

    return descend(case, batches())


def measure(case: Case, rounds: int) -> None:
    """Print the lines of one network at one size."""
    count = (WARM + case.steps) * BATCH
    pictures, tags = icons(case.image_size, count), labels(count)
    ids = np.random.default_rng(0).integers(0, 256, (count, 16), np.uint8)
    began = time.perf_counter()
    stream = [EncodedBatch.from_lists(ids, pictures, tags)]
    examples = ExampleSet.from_stream(
        stream,
        image_size=case.image_size,
        max_pixels=PILLOW_MAX_PIXELS,
        num_threads=CORES,
        scratch_path=Path(tempfile.gettempdir()),
        memory_limit_bytes=0,  # so that the pixels are paged from the scratch file, as those of a large part are
    )
    name = f"{case.backbone} at {case.image_size} px, {case.device.type}"
    print(f"{name}: {count:,} images decoded once in {time.perf_counter() - began:.1f} s", flush=True)
    systems: dict[str, Callable[[], float]] = {
        "bare loop over one batch: the ceiling": lambda: run_ceiling(case, examples),
        "hardmoe": lambda: run_ours(case, examples),
        "torch DataLoader script": lambda: run_script(case, pictures, tags),
    }
    rates: dict[str, list[float]] = {system: [] for system in systems}
    for _ in range(rounds):
        for system, run in systems.items():
            rates[system].append(run())
    ceilings = next(iter(rates.values()))
    for system, found in rates.items():
        ratios = [rate / ceiling for rate, ceiling in zip(found, ceilings, strict=True)]
        print(
            f"  {system:38} {statistics.median(found):9,.0f} images/s ({min(found):,.0f} to {max(found):,.0f})  "
            f"{statistics.median(ratios):.3f} of the ceiling ({min(ratios):.3f} to {max(ratios):.3f})",
            flush=True,
        )


def main() -> None:
    """Print three lines for every network and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="quicknet_w24")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    torch.set_num_threads(CORES)
    today = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    print(f"{today}, {CORES} cores, {platform.machine()}, torch {torch.__version__}", flush=True)
    for size in options.sizes:
        measure(Case(options.backbone, size, torch.device("cpu"), options.steps), options.rounds)
    if not torch.cuda.is_available():
        print("no GPU here: ResNet-18 at 64 px and ResNet-50 at 224 px in bfloat16 were not measured")
        return
    print(torch.cuda.get_device_name())
    for backbone, size in (("resnet18", 64), ("resnet50", 224)):
        measure(Case(backbone, size, torch.device("cuda"), options.steps), options.rounds)


if __name__ == "__main__":
    main()
