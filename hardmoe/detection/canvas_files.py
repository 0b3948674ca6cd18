"""Files of the detection set: safetensors of canvases in a row, with the objects of all of them and where each canvas's begin.

Rejected: a Parquet table of encoded images, which is for collections that do not fit in memory; this set is made to fit.

Shape letters: N canvases, S side, M objects.
"""

from dataclasses import dataclass

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from hardmoe.detection.canvases import Canvas
from hardmoe.stage import InputArtifact

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class CanvasSet:
    """Canvases in a row."""

    images_NSS3: NDArray[np.uint8]
    boxes_M4: NDArray[np.float32]
    """xyxy in pixels."""
    classes_M: NDArray[np.int64]
    ranges_M: NDArray[np.int64]
    """0 small, 1 medium, 2 large."""
    starts_N1: NDArray[np.int64]
    """Canvas n has the objects from `starts[n]` to `starts[n + 1]`."""

    def __len__(self) -> int:
        return len(self.images_NSS3)

    def objects(self, canvas: int) -> slice:
        """Which rows a canvas has."""
        return slice(int(self.starts_N1[canvas]), int(self.starts_N1[canvas + 1]))

    @property
    def canvases_M(self) -> NDArray[np.int64]:
        """Of every object its canvas."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts_N1))


def to_bytes(canvases: list[Canvas]) -> bytes:
    """A file of some canvases."""
    counts = [len(canvas.classes_M) for canvas in canvases]
    data: bytes = safetensors.numpy.save(
        {
            "images": np.stack([canvas.image_SS3 for canvas in canvases]),
            "boxes": np.concatenate([canvas.boxes_M4 for canvas in canvases]),
            "classes": np.concatenate([canvas.classes_M for canvas in canvases]),
            "ranges": np.concatenate([canvas.ranges_M for canvas in canvases]),
            "starts": np.cumsum([0, *counts]).astype(np.int64),
        }
    )
    return data


def read_canvases(artifact: InputArtifact, split: str) -> CanvasSet:
    """All canvases of a split, in their order."""
    parts = [
        safetensors.numpy.load(artifact.storage.read_bytes(path)) for path in artifact.files(prefix=f"{split}/", suffix=SUFFIX)
    ]
    counts = np.concatenate([np.diff(part["starts"]) for part in parts])
    images, boxes, classes, ranges = (
        np.concatenate([part[name] for part in parts]) for name in ("images", "boxes", "classes", "ranges")
    )
    return CanvasSet(images, boxes, classes, ranges, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
