"""One collection in every container that a source reads, so that tests can demand the same rows of them all.

Keys are the examples' numbers. Where examples have parts, these stand in a column or field `part` (not in `folder-names`).
What the containers cannot all hold (no hashtags at all, a hashtag with a space) is left to the tests of each source.
"""

import csv
import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hardmoe.data.sources.base import RawExample
from hardmoe.storage import open_storage

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

SPLITS = ("train", "validation", "test")


def ending_of(image: bytes) -> str:
    """The ending that a file with these bytes would have."""
    return "png" if image.startswith(b"\x89PNG") else "jpg"


def parts_of(examples: Sequence[RawExample]) -> dict[str, list[str | None]]:
    """The column of the parts, if there are any."""
    parts = [row.part for row in examples]
    return {"part": parts} if any(part is not None for part in parts) else {}


def write_parquet(folder: Path, examples: Sequence[RawExample]) -> dict[str, Any]:
    """Three files with encoded bytes."""
    folder.mkdir(parents=True)
    for number in range(3):
        chosen = examples[number::3]
        columns = {"image": [row.image for row in chosen], "hashtags": [list(row.tags) for row in chosen], **parts_of(chosen)}
        pq.write_table(pa.table(columns), folder / f"{number}.parquet", row_group_size=16)
    return {"source": "parquet", "path": f"{folder}/*.parquet"}


def write_parquet_of_paths(folder: Path, examples: Sequence[RawExample]) -> dict[str, Any]:
    """Two files that name the images beside them."""
    names = write_images(folder, examples)
    for number in range(2):
        chosen = examples[number::2]
        columns = {"image": names[number::2], "hashtags": [" ".join(row.tags) for row in chosen], **parts_of(chosen)}
        pq.write_table(pa.table(columns), folder / f"{number}.parquet", row_group_size=16)
    return {"source": "parquet", "path": f"{folder}/*.parquet"}


def write_images(folder: Path, examples: Sequence[RawExample]) -> list[str]:
    """Files in two folders; returns their names below `folder`."""
    names = [f"{number % 2}/{number:05d}.{ending_of(row.image)}" for number, row in enumerate(examples)]
    for name, row in zip(names, examples, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(row.image)
    return names


def tar_of(members: Sequence[tuple[str, bytes]], mode: str = "w") -> bytes:
    """An archive of plain files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return out.getvalue()


def sample_of(key: str, example: RawExample) -> list[tuple[str, bytes]]:
    """The members of one sample, its hashtags in JSON."""
    part = {} if example.part is None else {"part": example.part}
    fields = json.dumps({"hashtags": list(example.tags), **part}).encode()
    return [(f"{key}.{ending_of(example.image)}", example.image), (f"{key}.json", fields)]


def write_webdataset(folder: Path, examples: Sequence[RawExample], ending: str = "tar") -> dict[str, Any]:
    """Three tars."""
    folder.mkdir(parents=True)
    for number in range(3):
        samples = [sample_of(f"{index:05d}", row) for index, row in list(enumerate(examples))[number::3]]
        members = [member for sample in samples for member in sample]
        (folder / f"{number}.{ending}").write_bytes(tar_of(members, "w" if ending == "tar" else "w:gz"))
    return {"source": "webdataset", "path": f"{folder}/*.{ending}"}


def write_folder_with_csv(folder: Path, examples: Sequence[RawExample]) -> dict[str, Any]:
    """Images and a CSV file of their hashtags."""
    names = write_images(folder / "images", examples)
    with (folder / "tags.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "hashtags", *parts_of(examples)])
        further = zip(*parts_of(examples).values(), strict=True) if parts_of(examples) else [()] * len(examples)
        writer.writerows([name, ", ".join(row.tags), *more] for name, row, more in zip(names, examples, further, strict=True))
    return {"source": "folder", "path": f"{folder}/images", "tags_path": f"{folder}/tags.csv"}


def write_folder_with_jsonl(folder: Path, examples: Sequence[RawExample]) -> dict[str, Any]:
    """Images and a JSONL file of their hashtags."""
    names = write_images(folder / "images", examples)
    parts = [{} if row.part is None else {"part": row.part} for row in examples]
    rows = [
        json.dumps({"image": name, "hashtags": list(row.tags), **part})
        for name, row, part in zip(names, examples, parts, strict=True)
    ]
    (folder / "tags.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {"source": "folder", "path": f"{folder}/images", "tags_path": f"{folder}/tags.jsonl"}


def write_folder_of_folders(folder: Path, examples: Sequence[RawExample]) -> dict[str, Any]:
    """Images in folders that are called as their hashtags, one within the other."""
    for number, row in enumerate(examples):
        path = folder.joinpath(*row.tags, f"{number:05d}.{ending_of(row.image)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row.image)
    return {"source": "folder", "path": str(folder)}


def write_huggingface(folder: Path, examples: Sequence[RawExample]) -> dict[str, Any]:
    """A folder as `DatasetDict.save_to_disk` leaves it, with two splits."""
    import datasets

    datasets.disable_progress_bars()
    kinds = {"image": datasets.Image(), "hashtags": datasets.Sequence(datasets.Value("string"))}
    features = datasets.Features(kinds | {name: datasets.Value("string") for name in parts_of(examples)})
    splits = {}
    for name, chosen in (("train", examples[::2]), ("test", examples[1::2])):
        rows = {"image": [{"bytes": row.image, "path": None} for row in chosen], "hashtags": [list(row.tags) for row in chosen]}
        splits[name] = datasets.Dataset.from_dict(rows | parts_of(chosen), features=features)
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return {"source": "huggingface", "path": str(folder)}


WRITERS: dict[str, Callable[[Path, Sequence[RawExample]], dict[str, Any]]] = {
    "parquet": write_parquet,
    "parquet-paths": write_parquet_of_paths,
    "webdataset": write_webdataset,
    "webdataset-gz": lambda folder, examples: write_webdataset(folder, examples, "tar.gz"),
    "folder-csv": write_folder_with_csv,
    "folder-jsonl": write_folder_with_jsonl,
    "folder-names": write_folder_of_folders,
    "huggingface": write_huggingface,
}
"""Each writes examples into a new folder and returns the keys of the recipe's `dataset` section that read them again."""


def moved_to_store(config: dict[str, Any], folder: Path, uri: str) -> dict[str, Any]:
    """Copy a written collection below a URI; returns its section with the paths there."""
    storage = open_storage(uri)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.write_bytes(path.relative_to(folder).as_posix(), path.read_bytes())
    place, question, options = uri.partition("?")
    return {
        key: place + value.removeprefix(str(folder)) + question + options if value.startswith(str(folder)) else value
        for key, value in config.items()
    }
