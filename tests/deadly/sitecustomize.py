"""A decoder that dies: with this folder on PYTHONPATH every Python process is killed by an image that ends in `deadly`.

Python imports a module of this name at its start, so that workers of Ray and children of theirs have it as well. It stands for a
decoder with a bug in it, which we would mend and not keep for a test.
"""

import os
import signal
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hardmoe.data import images

_decode = images.decode


def decode(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    """The decoder, but for images that end in a word of ours."""
    if data.endswith(b"deadly"):
        os.kill(os.getpid(), signal.SIGKILL)
    if data.endswith(b"deadly once") and (order := Path(os.environ["DEADLY_ONCE"])).exists():
        order.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    if data.endswith(b"a bug"):
        raise ZeroDivisionError("a bug in the decoder")
    return _decode(data, max_pixels)


images.decode = decode
