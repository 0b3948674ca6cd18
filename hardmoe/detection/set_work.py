"""The code of the detection set: read the source, choose classes, draw canvases.

    read     a unit per shard: every usable image as a small square, with its hashtags
    choose   one unit: the commonest hashtags, the images with exactly one of them, which of those are held out
    draw     units of some hundred canvases

An image's bytes decide whether it is on training or test canvases, so that the same picture under two names is on one side.

Shape letters: I images, P side of an image.
"""

import json
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from itertools import islice

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from hardmoe.config import Json
from hardmoe.data.config import DatasetConfig
from hardmoe.data.hashtags import normalise
from hardmoe.data.ids import content_id
from hardmoe.data.images import UndecodableImageError, decode
from hardmoe.data.sources.base import BadExample, RawExample, SourceShard
from hardmoe.data.sources.registry import open_source
from hardmoe.detection.canvas_files import SUFFIX, to_bytes
from hardmoe.detection.canvases import Pool, draw_canvas, ink, pool_square
from hardmoe.detection.config import RANGES, CanvasesConfig
from hardmoe.errors import DataError
from hardmoe.hashing import hash_fractions
from hardmoe.stage import Completion, Context, DriverContext, Finished, Phase, Unit, UnitContext

POOL_SIZE = 64
"""Side of the squares that objects are scaled from, in pixels."""


class SetWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Read, choose, draw."""
        config = _canvases(context)
        shards = open_source(context.stage.section(DatasetConfig, "dataset")).shards()
        limit = -(-config.max_images // max(1, len(shards)))
        read = yield Phase(
            "read",
            [
                Unit(f"{number:05d}", {"shard": {"name": each.name, "items": each.items}, "limit": limit})
                for number, each in enumerate(shards)
            ],
        )
        (chosen,) = yield Phase("choose", [Unit("classes", {"read": [dict(each.scratch) for each in read]})])
        drawn = yield Phase("draw", list(_drawing(config, chosen)))
        objects = {split: _objects(drawn, split) for split in ("train", "test")}
        bad = sum(each.payload["bad"] for each in read)
        return Finished({**chosen.payload, "size": config.size, "not_usable": bad, "objects": objects})

    def run(self, context: UnitContext) -> Json:
        """One unit of either phase."""
        return {"read": _read, "choose": _choose, "draw": _draw}[context.phase](context)


def _objects(drawn: Iterable[Completion], split: str) -> dict[str, int]:
    of_split = [each.payload["ranges"] for each in drawn if each.payload["split"] == split]
    return {name: sum(ranges[number] for ranges in of_split) for number, name in enumerate(RANGES)}


def _canvases(context: Context) -> CanvasesConfig:
    return context.stage.section(CanvasesConfig, "canvases")


def _drawing(config: CanvasesConfig, chosen: Completion) -> Iterable[Unit]:
    for split, count in (("train", config.num_train), ("test", config.num_test)):
        for index, start in enumerate(range(0, count, config.shard_canvases)):
            stop = min(count, start + config.shard_canvases)
            arguments = {"split": split, "start": start, "stop": stop, "pool": chosen.scratch["pool"]}
            yield Unit(f"{split}-{index:05d}", arguments, cost=stop - start)


def _read(context: UnitContext) -> Json:
    """The usable images of a shard, from its beginning on."""
    config = context.stage.section(DatasetConfig, "dataset")
    told, limit = context.unit.arguments["shard"], context.unit.arguments["limit"]
    squares: list[NDArray[np.uint8]] = []
    rows: list[Json] = []
    bad = 0
    for row in islice(open_source(config).read(SourceShard(told["name"], told["items"])), limit):
        square = _square(row, config.max_pixels)
        if square is None or isinstance(row, BadExample):
            bad += 1
            continue
        squares.append(square)
        rows.append({"id": content_id(row.image).hex(), "tags": sorted({normalise(tag) for tag in row.tags} - {""})})
        context.progress(len(rows), limit)
    images_IPP3 = np.stack(squares) if squares else np.zeros((0, POOL_SIZE, POOL_SIZE, 3), np.uint8)
    with context.scratch("images") as sink:
        sink.write(safetensors.numpy.save({"images": images_IPP3}))
    with context.scratch("rows") as sink:
        sink.write(json.dumps(rows).encode())
    return {"bad": bad}


def _square(row: RawExample | BadExample, max_pixels: int) -> NDArray[np.uint8] | None:
    """None where there is nothing to see."""
    if isinstance(row, BadExample):
        return None
    try:
        square_PP3 = pool_square(decode(row.image, max_pixels) if row.pixels is None else row.pixels, POOL_SIZE)
    except UndecodableImageError:
        return None
    return square_PP3 if ink(square_PP3) is not None else None


def _choose(context: UnitContext) -> Json:
    """Classes, and the pool of images that have exactly one."""
    config, read = _canvases(context), context.unit.arguments["read"]
    rows = [json.loads(context.storage.read_bytes(each["rows"])) for each in read]
    skipped = {normalise(tag) for tag in config.skip}
    counts = Counter(tag for shard in rows for row in shard for tag in row["tags"] if tag not in skipped)
    names = [tag for tag, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: config.num_classes]]
    if len(names) < config.num_classes:
        raise DataError(
            f"canvases.num_classes: the images have {len(names)} hashtags that are not skipped, fewer than {config.num_classes}; "
            "set it lower"
        )
    images: list[NDArray[np.uint8]] = []
    classes: list[int] = []
    ids: list[bytes] = []
    for each, shard in zip(read, rows, strict=True):
        squares = safetensors.numpy.load(context.storage.read_bytes(each["images"]))["images"]
        for row, square in zip(shard, squares, strict=True):
            tags = [tag for tag in row["tags"] if tag in names]
            if len(tags) == 1:
                images.append(square)
                classes.append(names.index(tags[0]))
                ids.append(bytes.fromhex(row["id"]))
    ids_I16 = np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 16)
    test_I = hash_fractions(ids_I16, context.stage.config["seed"], "held out") < config.test_fraction
    classes_I = np.array(classes, np.int64)
    with context.scratch("pool") as sink:
        sink.write(safetensors.numpy.save({"images": np.stack(images), "classes": classes_I, "test": test_I}))
    return {"classes": names, "images": _counted(names, classes_I, test_I)}


def _counted(names: Sequence[str], classes_I: NDArray[np.int64], test_I: NDArray[np.bool_]) -> dict[str, list[int]]:
    """Of either split the images of every class.

    Raises:
        DataError: a class has none.
    """
    found = {
        split: np.bincount(classes_I[kept_I], minlength=len(names)).tolist()
        for split, kept_I in (("train", ~test_I), ("test", test_I))
    }
    for split, counts in found.items():
        if 0 in counts:
            raise DataError(
                f"the class '{names[counts.index(0)]}' has no image for {split} canvases that has no other class; "
                "set canvases.num_classes lower, or add the hashtag to canvases.skip"
            )
    return found


def _draw(context: UnitContext) -> Json:
    """Some canvases of a split."""
    config, arguments = _canvases(context), context.unit.arguments
    stored = safetensors.numpy.load(context.storage.read_bytes(arguments["pool"]))
    kept_I = stored["test"] == (arguments["split"] == "test")
    pool = Pool(stored["images"][kept_I], stored["classes"][kept_I])
    canvases = []
    for number in range(arguments["start"], arguments["stop"]):
        canvases.append(draw_canvas(pool, config, context.stage.config["seed"], arguments["split"], number))
        context.progress(len(canvases), arguments["stop"] - arguments["start"])
    with context.output(f"{arguments['split']}/{context.unit.name}{SUFFIX}") as sink:
        sink.write(to_bytes(canvases))
    ranges = np.bincount(np.concatenate([each.ranges_M for each in canvases]), minlength=len(RANGES))
    return {"split": arguments["split"], "ranges": ranges.tolist()}
