"""More than 3,000 broken, hostile or odd image files, each with what must become of it.

    for image in hostile_images(): image.name, image.data, image.outcome, image.pixels, image.reason

Made anew by every caller from fixed seeds, 16 MB in a few seconds, so no file of somebody's is in the repository. The expected
outcome never comes from the code under test: it is known by construction, from a format's own checksums, or from another
build of the reference library (see the module of each format). Run as a program, it puts all of them through `decode` in this
process and prints what went wrong and how much memory that took, as JSON.
"""

import json
import resource
import sys
import warnings
from functools import cache

import numpy as np
from hostile_base import MAX_PIXELS, HostileImage
from hostile_jpeg import jpeg_images
from hostile_others import other_images
from hostile_png import png_images
from memory import peak_bytes

__all__ = ["MAX_PIXELS", "HostileImage", "hostile_images"]


@cache
def hostile_images() -> list[HostileImage]:
    """All of them, always in the same order; their names are unique."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of the very things that are made here
        return [*jpeg_images(), *png_images(), *other_images()]


def problem(image: HostileImage) -> str | None:
    """What `decode` did wrong with a file, or None."""
    from hardmoe.data.images import UndecodableImageError, decode

    try:
        pixels = decode(image.data, MAX_PIXELS)
    except UndecodableImageError as error:
        if len(str(error)) > 300:
            return f"the reason has {len(str(error))} characters"
        return f"refused ({error}) although: {image.reason}" if image.outcome == "decode" else None
    if image.outcome == "refuse":
        return f"decoded although: {image.reason}"
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size or not pixels.flags.writeable:
        return f"not an image: {pixels.dtype} {pixels.shape}"
    if image.pixels is None:
        return None
    if pixels.shape != image.pixels.shape:
        return f"shape {pixels.shape} instead of {image.pixels.shape}"
    if image.tolerance == 0:
        return None if np.array_equal(pixels, image.pixels) else "other pixels"
    difference = int(np.abs(pixels.astype(np.int16) - image.pixels).max())
    return f"pixels differ by {difference}" if difference > image.tolerance else None


def main() -> None:
    """Decode everything; the limit on address space, in bytes beyond what is in use at the start, is the first argument."""
    images = hostile_images()
    before = peak_bytes()
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: PTH123, SIM115
    resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]),) * 2)
    problems = {image.name: what for image in images if (what := problem(image)) is not None}
    print(json.dumps({"files": len(images), "problems": problems, "peak_bytes": peak_bytes() - before}))


if __name__ == "__main__":
    main()
