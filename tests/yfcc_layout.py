"""A small collection in YFCC100M's public layout: 50 real drawings as JPEG files, and what is wrong with the real one.

File names are made here by slicing the digest's text, and in the source by formatting its bytes: two ways to the same names.
"""

import bz2
import gzip
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote_plus

from PIL import Image
from support import real_images

LICENSES = ("Attribution License", "Attribution-NonCommercial-ShareAlike License")
ODD_TAGS = ("new york", "straße", "東京", "rock,paper", "50%", "c++", "#sunset")
"""What people have typed: spaces, other alphabets, and the very characters that the encoding needs."""


@dataclass(frozen=True)
class Line:
    """One line of metadata and, unless it is missing, the file that belongs to it."""

    identifier: str
    tags: tuple[str, ...]
    license: str
    is_video: bool = False

    @property
    def address(self) -> str:
        return f"http://farm1.staticflickr.com/{int(self.identifier) % 97}/{self.identifier}_0a1b2c3d4e.jpg"

    @property
    def digest(self) -> str:
        return hashlib.md5(self.address.encode()).hexdigest()

    @property
    def file(self) -> str:
        name = re.sub("0?(.+)", r"\1", "\n".join(re.findall("..", self.digest))).replace("\n", "")
        return f"{name[:3]}/{name[3:6]}/{name}.jpg"

    def fields(self) -> list[str]:
        """The 23 fields of the first release."""
        tags = ",".join(map(quote_plus, self.tags))
        text = quote_plus("a title\twith a tab, ünïcode\n")
        page = f"http://www.flickr.com/photos/1@N00/{self.identifier}/"
        place = ["-81.804885", "24.550558", "12"]
        head = [self.identifier, "1@N00", "somebody", "2012-02-16 09:56:37.0", "1331840483", "Canon+PowerShot", text, text, tags]
        license_uri = "http://creativecommons.org/licenses/by/2.0/"
        tail = ["12", "1", "0a1b2c3d4e", "5f6a7b8c9d", "jpg", "1" if self.is_video else "0"]
        return [*head, "camera:model=x", *place, page, self.address, self.license, license_uri, *tail]


@dataclass(frozen=True)
class Layout:
    """Where the collection is, and what a reader must find in it."""

    metadata: Path
    images: Path
    good: dict[str, Line]
    """By id, the photos that can be read."""
    bad: dict[str, str]
    """By id, or by place where a line has none, part of the reason."""


def jpeg(png: bytes) -> bytes:
    """An image as the collection holds it."""
    target = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        image.resize((48, 32)).save(target, format="JPEG", quality=95)
    return target.getvalue()


def write_yfcc(metadata: Path, images: Path, num_images: int = 50) -> Layout:
    """Write three pieces of metadata (plain; 25 fields and `.bz2`; `.gz`) into one folder and the photos into another."""
    metadata.mkdir(parents=True)
    lines, good = [], {}
    for number, example in enumerate(real_images(num_images)):
        tags = (*example.tags, *(ODD_TAGS if number == 0 else ()))
        line = Line(str(4_000_000_000 + 7919 * number), tags, LICENSES[number % 2])
        lines.append(line)
        good[line.identifier] = line
        place = images / line.file
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(jpeg(example.image))
    missing = Line("5000000001", ("gone",), LICENSES[0])
    video = Line("5000000002", ("moving",), LICENSES[0], is_video=True)
    third = len(lines) // 3
    plain = [line.fields() for line in (*lines[:third], missing, video)] + [["a line", "of another", "file"]]
    hashed = [[str(number), *with_hash(line)] for number, line in enumerate(lines[third : 2 * third])]
    (metadata / "yfcc100m_dataset-0").write_bytes(packed(plain))
    (metadata / "yfcc100m_dataset-1.bz2").write_bytes(bz2.compress(packed(hashed)))
    (metadata / "yfcc100m_dataset-2.gz").write_bytes(gzip.compress(packed([line.fields() for line in lines[2 * third :]])))
    bad = {
        "yfcc100m:5000000001": "no such file",
        "yfcc100m:5000000002": "a video",
        f"yfcc100m_dataset-0#byte={len(packed(plain[:-1]))}": "neither 23 nor 25 fields (3)",
    }
    return Layout(metadata, images, good, bad)


def with_hash(line: Line) -> list[str]:
    """The later release's fields but for the line's number: the hash follows the id."""
    first, *rest = line.fields()
    return [first, line.digest, *rest]


def packed(lines: Sequence[Sequence[str]]) -> bytes:
    """The bytes of a piece."""
    return "".join("\t".join(line) + "\n" for line in lines).encode()
