"""Images as whoever uses a mixture has them: files, URIs, encoded bytes, Pillow's images, arrays, tensors.

Files and bytes go through the decoders that the dataset stage uses; pixels that somebody decoded already are taken as they
are. Rejected: guessing at floats (0 to 1, or 0 to 255, or normalised already?) and at layouts (a 3 x 3 x 3 array has both): each
type has one layout, and what has another is refused with the remedy.

Shape letters: N images, H height, W width, S side in pixels, 3 the channels red, green, blue.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hardmoe.data.config import PILLOW_MAX_PIXELS
from hardmoe.data.decoding import pixels_of_pillow
from hardmoe.data.images import UndecodableImageError, load_square, resize_square
from hardmoe.data.places import open_place
from hardmoe.data.sources.fields import MOST_IMAGE_BYTES
from hardmoe.errors import DataError, StorageError

if TYPE_CHECKING:
    from torch import Tensor

    GivenImage: TypeAlias = "str | Path | bytes | Image.Image | NDArray[np.uint8] | Tensor"

_THREADS = 8
_ALONE = 8
"""So few images are decoded by the calling thread."""


def squares(
    images: "Sequence[GivenImage]", size: int, *, reduced: bool = False, max_pixels: int = PILLOW_MAX_PIXELS
) -> NDArray[np.uint8]:
    """Decode every image and fit it into a square, as the dataset stage and the networks' training do.

    Args:
        images: each a path or URI (`s3://…`, `file://…`), encoded bytes, one of Pillow's images, a NumPy array uint8 [H, W, 3],
            or a tensor uint8 [3, H, W].
        size: S.
        reduced: whether JPEGs may be scaled down while they are decoded, as `load_square` says.
        max_pixels: larger images are refused before their pixels are decoded.

    Returns:
        uint8 [N, 3, S, S].

    Raises:
        TypeError: something that is no image, or one image in place of several.
        DataError: an image cannot be read or decoded; names its position.
    """
    _refuse_one(images)
    pixels_NSS3 = np.empty((len(images), size, size, 3), np.uint8)

    def load(position: int) -> None:
        image = images[position]
        try:
            pixels_NSS3[position] = _square(image, size, reduced, max_pixels).transpose(1, 2, 0)
        except TypeError as error:
            raise TypeError(f"images must be a list of images, but item {position} is {error}") from error
        except (UndecodableImageError, StorageError) as error:
            named = f" ({image})" if isinstance(image, str | Path) else ""
            raise DataError(f"image {position} of {len(images)}{named}: {error}") from error

    if len(images) <= _ALONE:
        for position in range(len(images)):
            load(position)
    else:
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="decode") as pool:
            list(pool.map(load, range(len(images))))
    return pixels_NSS3.transpose(0, 3, 1, 2)


def pieces(images: "Sequence[GivenImage]", size: int, most_bytes: int) -> "Iterator[Sequence[GivenImage]]":
    """Runs of the images whose squares of `size` pixels take `most_bytes` at most together, or one by one."""
    _refuse_one(images)
    step = max(1, most_bytes // (3 * size**2))
    for start in range(0, len(images), step):
        yield images[start : start + step]


def _refuse_one(images: Any) -> None:
    if isinstance(images, str | Path | bytes | bytearray | Image.Image):
        raise TypeError(f"images must be a list of images, not one of type {type(images).__name__}; put it into brackets")
    if getattr(images, "ndim", 4) != 4:
        raise TypeError(f"images must be a list of images, not an array of shape {list(images.shape)}; put it into brackets")


def _square(image: Any, size: int, reduced: bool, max_pixels: int) -> NDArray[np.uint8]:
    """One image, uint8 [3, S, S]."""
    if isinstance(image, str | Path):
        image = read_image(str(image))
    if isinstance(image, bytes | bytearray | memoryview):
        return load_square(bytes(image), size, max_pixels, reduced=reduced)
    return resize_square(_pixels(image), size)


def read_image(place: str) -> bytes:
    """The bytes of an image file, by path or URI.

    Raises:
        StorageError: it cannot be read, or is too large for an image.
    """
    if place.startswith(("http://", "https://")):
        raise StorageError("a web address; download the image first")
    with closing(open_place(place)) as file:
        data = file.read(MOST_IMAGE_BYTES + 1)
    if len(data) > MOST_IMAGE_BYTES:
        raise StorageError("larger than 1 GiB, which is no image; correct the path")
    return data


def _pixels(image: Any) -> NDArray[np.uint8]:
    """Pixels that are decoded already, uint8 [H, W, 3]."""
    if isinstance(image, Image.Image):
        return pixels_of_pillow(image)
    if isinstance(image, np.ndarray):
        found, layout = image, "uint8 [height, width, 3]"
        is_right = image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    elif type(image).__module__.partition(".")[0] == "torch" and hasattr(image, "detach"):
        found, layout = image.detach().cpu().numpy(), "uint8 [3, height, width]"
        is_right = found.dtype == np.uint8 and found.ndim == 3 and found.shape[0] == 3
        found = found.transpose(1, 2, 0) if is_right else found
    else:
        raise TypeError(
            f"a {type(image).__name__}; give paths, URIs, encoded bytes, Pillow's images, arrays uint8 [height, width, 3] or "
            "tensors uint8 [3, height, width]"
        )
    if not is_right:
        kind = "an array" if isinstance(image, np.ndarray) else "a tensor"
        raise TypeError(f"{kind} of {found.dtype} {list(found.shape)}; convert it to {layout}")
    if 0 in found.shape:
        raise UndecodableImageError(f"no pixels (shape {list(found.shape)})")
    return found
