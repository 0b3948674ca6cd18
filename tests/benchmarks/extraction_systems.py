"""The systems that `extraction.py` compares, each as a program of its own that reads the same pictures once.

    python tests/benchmarks/extraction_systems.py SYSTEM DIRECTORY --size S --cores C --began SECONDS [--reduced]

A system notes when each of its batches was done (`note`); from the notes of all its processes come the time to the first batch
and the steady rate. Everybody but Ray Data's own reader decodes with hardmoe's decoder, so that what differs is the machinery.
The ceiling calls the two libraries below that decoder directly, without its checks.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 64
"""Images between two notes, and of one batch, for everybody but our stage, whose batches are what they are."""
UNITS_PER_CORE = 1
STEADY_UNTIL = 0.95
"""The rest is the tail, in which cores run out of work one after another."""
PIXELS = 10**8


def note(rows: int) -> None:
    """One batch is done, now, by this process."""
    with Path(os.environ["EXTRACTION_NOTES"], str(os.getpid())).open("a") as notes:
        notes.write(f"{time.time()} {rows}\n")


def measured(notes: Path, began: float, workers: int) -> dict[str, float]:
    """Seconds to the first batch, and images per second from when all workers have had one until few are left."""
    events = {}
    for file in notes.iterdir():
        rows = [line.split() for line in file.read_text().splitlines()]
        events[file.name] = (np.array([float(t) for t, _ in rows]), np.cumsum([int(n) for _, n in rows]))
    firsts = sorted(times[0] for times, _ in events.values())
    start = firsts[min(workers, len(firsts)) - 1]
    moments = np.unique(np.concatenate([times for times, _ in events.values()]))
    done = sum(np.interp(moments, times, counts, left=0.0) for times, counts in events.values())
    images = sum(int(counts[-1]) for _, counts in events.values())
    at_start = float(np.interp(start, moments, done))
    end = float(np.interp(STEADY_UNTIL * images, done, moments))
    rate = (STEADY_UNTIL * images - at_start) / (end - start)
    return {"first": firsts[0] - began, "steady": rate, "seconds": float(moments[-1]) - began, "images": images}


def files_in(directory: Path) -> list[Path]:
    """The pictures."""
    return sorted((directory / "files").iterdir())


# --- the ceiling ---------------------------------------------------------------------------------------------------------


def ceiling(directory: Path, size: int, cores: int, reduced: bool) -> None:
    """One process per core that does nothing but read, decode and resize."""
    import torch

    torch.set_num_threads(1)
    files = files_in(directory)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_bare_loop, args=(files[core::cores], size)) for core in range(cores)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def _bare_loop(files: Sequence[Path], size: int) -> None:
    import simplejpeg
    import torch

    target_BSS3 = np.empty((BATCH, size, size, 3), np.uint8)
    for count, file in enumerate(files, 1):
        pixels_HW3 = simplejpeg.decode_jpeg(file.read_bytes())
        height, width, _ = pixels_HW3.shape
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square_13SS = torch.from_numpy(pixels_HW3[top : top + side, left : left + side].copy())[None].permute(0, 3, 1, 2)
        small_13SS = torch.nn.functional.interpolate(square_13SS, size=(size, size), mode="bilinear", antialias=True)
        target_BSS3[count % BATCH] = small_13SS[0].permute(1, 2, 0).numpy()
        if count % BATCH == 0 or count == len(files):
            note(count % BATCH or BATCH)


# --- our stage -----------------------------------------------------------------------------------------------------------


def free_trunk(image_size: int) -> Any:
    """A backbone that costs nothing: 49 of the pixels, averaged."""
    import torch

    class Free(torch.nn.Module):
        """Also notes every batch; a blank row is the darkest that there is, in every pixel."""

        num_features = 3

        def forward(self, images_B3SS: torch.Tensor) -> torch.Tensor:
            step = max(1, image_size // 7)
            features_B3 = images_B3SS[:, :, ::step, ::step].mean((2, 3))
            if "EXTRACTION_NOTES" in os.environ and len(images_B3SS) > 2:
                note(int((features_B3 > -1.999).any(1).sum()))
            return features_B3

    return Free()


class DatasetWork:
    """A dataset of the files as they are."""

    def phases(self, context: Any) -> Generator[Any, Any, Any]:
        """One unit per shard."""
        from hardmoe.stage import Finished, Phase, Unit

        count = context.stage.config["shards"]
        yield Phase("write", [Unit(f"{index:05d}", {"index": index, "of": count}) for index in range(count)])
        return Finished({"store": "copy"})

    def run(self, context: Any) -> Any:
        """One shard."""
        from hardmoe.data.ids import content_id
        from hardmoe.data.schemas import EXAMPLES
        from hardmoe.tables import build_table, write_table

        index, count = context.unit.arguments["index"], context.unit.arguments["of"]
        images = [file.read_bytes() for file in files_in(Path(context.stage.operational["directory"]))[index::count]]
        columns = {"example_id": [content_id(image) for image in images], "image": images, "tags": [["photo"]] * len(images)}
        write_table(context.output(f"split=train/part-{index:05d}-of-{count:05d}.parquet"), build_table(EXAMPLES, columns))
        return {"rows": len(images)}


class TrunkWork:
    """The free trunk as an artifact."""

    def phases(self, context: Any) -> Generator[Any, Any, Any]:
        """One unit."""
        from hardmoe.stage import Finished, Phase, Unit

        (done,) = yield Phase("write", [Unit("trunk")])
        return Finished(done.payload)

    def run(self, context: Any) -> Any:
        """Write it."""
        import safetensors.torch

        from hardmoe.training.network import MODEL_FILE, Architecture, build_network

        size, decode = context.stage.config["size"], context.stage.config["decode"]
        architecture = Architecture("extraction_systems:free_trunk", "auto", size, 1, decode)
        network = build_network(architecture, seed=0)
        with context.output(MODEL_FILE) as out:
            out.write(safetensors.torch.save(network.state_dict()))
        return {"architecture": dataclasses.asdict(architecture), "num_features": network.backbone.num_features}


def _stages(directory: Path, size: int, cores: int, reduced: bool) -> list[Any]:
    from hardmoe.features.config import FeaturesConfig
    from hardmoe.features.stage import features_stage
    from hardmoe.stage import Stage

    decode = "reduced" if reduced else "full"
    shards, place = {"shards": cores * UNITS_PER_CORE}, {"directory": str(directory)}
    dataset = Stage("dataset", "dataset", 1, shards, "extraction_systems:DatasetWork", operational=place)
    shown = {"size": size, "decode": decode}
    trunk = Stage(f"trunk-{size}-{decode}", "trunk", 1, shown, "extraction_systems:TrunkWork")
    inputs = {"dataset": "dataset", "trunk": trunk.name}
    return [
        dataset,
        trunk,
        dataclasses.replace(features_stage(FeaturesConfig()), name=f"features-{size}-{decode}", inputs=inputs),
    ]


def _run(directory: Path, stages: Sequence[Any], inline: bool) -> None:
    from hardmoe.artifacts.store import ArtifactStore
    from hardmoe.execution.display import make_display
    from hardmoe.execution.inline import InlineBackend
    from hardmoe.execution.plan import make_plan
    from hardmoe.execution.progress import Reporter
    from hardmoe.execution.ray.backend import RayBackend
    from hardmoe.execution.runner import Runner, RunnerOptions
    from hardmoe.storage import open_storage

    store = ArtifactStore(open_storage(str(directory / "root")))
    reporter = Reporter(store.storage, make_display())
    make_backend = InlineBackend if inline else lambda: RayBackend("local")
    Runner(store, make_backend, reporter, RunnerOptions()).run(make_plan(store, stages))


def prepare(directory: Path, size: int, cores: int, reduced: bool) -> None:
    """What stands before the measurement: our dataset and trunk, and tar files of the same pictures."""
    _run(directory, _stages(directory, size, cores, reduced)[:2], inline=True)
    tars = directory / "tars"
    if not tars.exists():
        tars.mkdir()
        files = files_in(directory)
        for index in range(cores * UNITS_PER_CORE):
            with tarfile.open(tars / f"{index:05d}.tar", "w") as archive:
                for file in files[index :: cores * UNITS_PER_CORE]:
                    archive.add(file, file.name)


def stage(directory: Path, size: int, cores: int, reduced: bool) -> None:
    """The features stage as a run builds it: on Ray, one unit per core at a time."""
    stages = _stages(directory, size, cores, reduced)
    shutil.rmtree(directory / "root" / stages[-1].name, ignore_errors=True)
    _run(directory, stages, inline=False)


# --- the others ----------------------------------------------------------------------------------------------------------


def _ray_data(directory: Path, cores: int, make: Any, work: Any) -> None:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    import ray

    with tempfile.TemporaryDirectory(prefix="bench-ray-", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR", "_temp_dir": scratch}
        ray.init(num_cpus=cores, **options)
        try:
            ray.data.DataContext.get_current().enable_progress_bars = False
            for batch in make(ray.data).map_batches(work, batch_size=BATCH).iter_batches(batch_size=BATCH):
                note(len(batch["feature"]))
        finally:
            ray.shutdown()


def ray_data(directory: Path, size: int, cores: int, reduced: bool) -> None:
    """Ray Data's own reader and decoder, `read_images`, and our resizing."""

    def squares(batch: dict[str, Any]) -> dict[str, Any]:
        from hardmoe.data.images import resize_square

        return {"feature": np.stack([resize_square(image, size).mean((1, 2)) for image in batch["image"]])}

    _ray_data(directory, cores, lambda data: data.read_images(str(directory / "files"), mode="RGB"), squares)


def ray_data_with_our_decoder(directory: Path, size: int, cores: int, reduced: bool) -> None:
    """Ray Data that reads bytes, and our decoder."""

    def squares(batch: dict[str, Any]) -> dict[str, Any]:
        from hardmoe.data.images import load_square

        return {"feature": np.stack([load_square(data, size, PIXELS, reduced=reduced).mean((1, 2)) for data in batch["bytes"]])}

    _ray_data(directory, cores, lambda data: data.read_binary_files(str(directory / "files")), squares)


def data_loader(directory: Path, size: int, cores: int, reduced: bool) -> None:
    """torch's DataLoader over the files, with a worker per core."""
    import torch

    from hardmoe.data.images import load_square

    class Pictures(torch.utils.data.Dataset[torch.Tensor]):
        """The files."""

        def __init__(self) -> None:
            self.files = files_in(directory)

        def __len__(self) -> int:
            return len(self.files)

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.from_numpy(load_square(self.files[index].read_bytes(), size, PIXELS, reduced=reduced))

    for batch in torch.utils.data.DataLoader(Pictures(), batch_size=BATCH, num_workers=cores):
        note(len(batch))


def web_dataset(directory: Path, size: int, cores: int, reduced: bool) -> None:
    """WebDataset over tar files, with a worker per core."""
    import torch
    import webdataset

    from hardmoe.data.images import load_square

    def decoded(sample: dict[str, Any]) -> torch.Tensor:
        return torch.from_numpy(load_square(sample["jpg"], size, PIXELS, reduced=reduced))

    urls = [str(path) for path in sorted((directory / "tars").iterdir())]
    pictures = webdataset.WebDataset(urls, shardshuffle=False).map(decoded).batched(BATCH, collation_fn=torch.stack)
    for batch in webdataset.WebLoader(pictures, batch_size=None, num_workers=cores):
        note(len(batch))


SYSTEMS = {
    system.__name__: system for system in (prepare, ceiling, stage, ray_data, ray_data_with_our_decoder, data_loader, web_dataset)
}
OWN_PROCESSES = ("ceiling", "stage")
"""Where each worker notes its own batches; of the others the reader does."""


# --- the pictures --------------------------------------------------------------------------------------------------------


def photos(count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Crops of two photographs, mirrored, brightened and with a camera's noise, uint8 [391, 516, 3] or upright."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    originals = [Image.fromarray(image) for image in load_sample_images().images]
    for number in range(count):
        image = originals[number % 2]
        share = rng.uniform(0.5, 1)
        width, height = int(image.width * share), int(image.width * share * 0.66)
        left, top = int(rng.integers(0, image.width - width + 1)), int(rng.integers(0, max(1, image.height - height + 1)))
        part = image.crop((left, top, left + width, top + height)).resize((516, 391), Image.Resampling.BICUBIC)
        pixels = np.asarray(part).astype(np.float32) * rng.uniform(0.7, 1.2) + rng.normal(0, 2.5, (391, 516, 1))
        pixels = np.clip(pixels[:, :: 1 if number % 3 else -1], 0, 255).astype(np.uint8)
        yield pixels if number % 4 else np.ascontiguousarray(pixels.swapaxes(0, 1))


def write_files(directory: Path, count: int) -> None:
    """So many different JPEGs, 500 pixels long, of qualities from 80 to 90, with halved colour resolution."""
    import simplejpeg

    (directory / "files").mkdir()
    pictures = list(photos(min(count, 200)))
    rng = np.random.default_rng(1)
    for number in range(count):
        picture = pictures[number % len(pictures)]
        height, width = (375, 500) if picture.shape[1] > picture.shape[0] else (500, 375)
        top, left = rng.integers(0, 16, 2)
        part = np.ascontiguousarray(picture[top : top + height, left : left + width])
        data = simplejpeg.encode_jpeg(part, quality=int(rng.integers(80, 91)), colorsubsampling="420")
        (directory / "files" / f"{number:06d}.jpg").write_bytes(data)


def main() -> None:
    """Run one system."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--cores", type=int, required=True)
    parser.add_argument("--began", type=float, default=0.0)
    parser.add_argument("--reduced", action="store_true")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(dir=arguments.directory) as notes:
        os.environ["EXTRACTION_NOTES"] = notes
        SYSTEMS[arguments.system](arguments.directory, arguments.size, arguments.cores, arguments.reduced)
        if arguments.system != "prepare":
            workers = arguments.cores if arguments.system in OWN_PROCESSES else 1
            print(json.dumps(measured(Path(notes), arguments.began, workers)))


if __name__ == "__main__":
    main()
