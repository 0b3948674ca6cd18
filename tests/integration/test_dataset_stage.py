"""The dataset stage as a whole: one result however the source is cut, copies or references, near-duplicates, scaled images."""

import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import invoke, merged, real_images, records, refusal, run_here, snapshot, write_photos, write_recipe

from hardmoe.data.sources.base import RawExample

IMAGES = real_images(300)


def table(root: Path, pattern: str) -> list[dict[str, Any]]:
    return [row for path in sorted(root.glob(pattern)) for row in pq.read_table(path).to_pylist()]


def payload(root: Path, name: str = "dataset") -> dict[str, Any]:
    body: dict[str, Any] = json.loads((root / name / "artifact.json").read_text())["payload"]
    return body


def partition(directory: Path, **changes: Any) -> Path:
    """Build up to the partition; returns the root."""
    write_recipe(directory, **changes)
    run_here(directory, "partition")
    return directory / "runs" / "small"


def parts(root: Path) -> set[tuple[str, bytes, bytes, tuple[str, ...]]]:
    """Which part every example is in, with its image and hashtags."""
    return {
        (str(path.parent.relative_to(root)), row["example_id"], row["image"], tuple(row["tags"]))
        for path in root.glob("partition/split=*/expert=*/*.parquet")
        for row in pq.read_table(path).to_pylist()
    }


def test_dataset_does_not_depend_on_how_the_source_is_cut(tmp_path: Path) -> None:
    """Another order of the rows, other files, other row groups: the same examples in the same shards, byte for byte."""
    images = [*IMAGES[:100], *(RawExample(row.image, ("again",), "") for row in IMAGES[:20])]
    found = []
    for name, chosen, num_files in (("a", images, 3), ("b", images[::-1], 1), ("c", images[50:] + images[:50], 7)):
        write_photos(tmp_path / name / "photos", chosen, num_files)
        root = partition(tmp_path / name, dataset={"shard_rows": 32, "near_duplicates": "all"}, hashtags={"min_count": 2})
        files = {path.relative_to(root): path.read_bytes() for path in sorted(root.glob("dataset/split=*/*.parquet"))}
        found.append((files, payload(root)["copies_merged"], payload(root)["near_duplicates"]))
    assert found[0] == found[1] == found[2]
    assert found[0][1] == 20
    assert len(found[0][0]) > 4


def test_references_give_the_same_partition_as_copies_and_hold_no_image(tmp_path: Path) -> None:
    write_photos(tmp_path / "a" / "photos", IMAGES)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "photos").symlink_to(tmp_path / "a" / "photos")
    copied = partition(tmp_path / "a")
    referring = partition(tmp_path / "b", dataset={"store": "reference"})
    assert payload(copied)["store"] == "copy" and payload(referring)["store"] == "reference"
    assert payload(copied)["sizes"] == payload(referring)["sizes"]
    assert parts(copied) == parts(referring)
    stored = b"".join(path.read_bytes() for path in referring.rglob("dataset/**/*") if path.is_file())
    assert not any(row.image[20:50] in stored for row in IMAGES)
    columns = {name for path in referring.glob("dataset/split=*/*.parquet") for name in pq.read_schema(path).names}
    assert columns == {"example_id", "file", "offset", "length", "content_id", "tags"}
    assert not list(referring.rglob("scratch")), "nothing is left of what the stage put by"


def test_alias_edited_afterwards_rebuilds_the_vocabulary_and_nothing_before_it(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", IMAGES)
    (tmp_path / "aliases.csv").write_text("alias,tag\narrow,arrows\n")
    root = partition(tmp_path, dataset={"store": "reference"}, hashtags={"aliases": "aliases.csv", "min_count": 5})
    before = snapshot(root / "dataset")
    (tmp_path / "aliases.csv").write_text("alias,tag\narrow,arrows\nthin,light\n")
    sentence = refusal(invoke(tmp_path, "partition", "--backend", "inline"))
    assert "/vocabulary was built from another recipe (aliases.sha256" in sentence
    write_recipe(
        tmp_path,
        root="runs/again",
        reuse=["runs/small"],
        dataset={"store": "reference"},
        hashtags={"aliases": "aliases.csv", "min_count": 5},
    )
    run_here(tmp_path, "partition")
    again = tmp_path / "runs" / "again"
    assert json.loads((again / "dataset" / "artifact.json").read_text())["reused_from"] == str(root / "dataset")
    assert "light" in {row["tag"] for row in table(again, "vocabulary/tags.parquet")}
    assert snapshot(root / "dataset") == before


def test_moved_source_is_found_at_its_new_place_and_a_changed_image_is_told(tmp_path: Path) -> None:
    """References name no absolute place: the recipe's path may change, the bytes may not."""
    write_photos(tmp_path / "photos", IMAGES, num_files=2)
    write_recipe(tmp_path, dataset={"store": "reference"}, hashtags={"min_count": 1_000_000})
    refusal(invoke(tmp_path, "partition", "--backend", "inline"))
    (tmp_path / "photos").rename(tmp_path / "moved")
    settings = {"store": "reference", "path": "moved/*.parquet"}
    write_recipe(tmp_path, dataset=settings, hashtags={"min_count": 1_000_000})
    refusal(invoke(tmp_path, "partition", "--backend", "inline"))
    # A byte that turned over on the disk: size and time are as they were, so only the image's digest can tell.
    victim, image = tmp_path / "moved" / "1.parquet", IMAGES[1].image
    whole, stat = victim.read_bytes(), victim.stat()
    place = whole.index(image[30:60]) + 10
    victim.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    write_recipe(tmp_path, dataset=settings)
    sentence = refusal(invoke(tmp_path, "partition", "--backend", "inline"), 3)
    assert re.search(r"the image at 1.parquet, row \d+, is not the one that was ingested; put the source.s files back", sentence)
    victim.write_bytes(whole)
    root = partition(tmp_path, dataset=settings)
    assert {image for _, _, image, _ in parts(root)} == {row.image for row in IMAGES}


def test_source_that_cannot_be_read_again_is_refused_for_references(tmp_path: Path) -> None:
    write_recipe(tmp_path, dataset={"store": "reference", "source": "icons", "path": None, "icon_size": 16})
    sentence = refusal(invoke(tmp_path, "partition", "--backend", "inline"))
    assert sentence == "the source 'icons' cannot read single images again; set dataset.store: copy"


def photograph(seed: int, side: int = 96) -> np.ndarray:
    """Smooth shapes, as photographs have; uint8 [side, side, 3]."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


def encoded(image: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    target = io.BytesIO()
    Image.fromarray(image).save(target, kind, **options)
    return target.getvalue()


def content_id(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]


@pytest.mark.parametrize(("setting", "train_left"), [("none", 60), ("held_out", 50), ("all", 40)])
def test_near_duplicates_of_held_out_images_are_not_trained_on(tmp_path: Path, setting: str, train_left: int) -> None:
    """Forty photographs, ten in the test split; of twenty there is a second version, saved again as JPEG."""
    import pyarrow as pa

    photos = [photograph(seed) for seed in range(40)]
    originals = [encoded(photo) for photo in photos]
    versions = [encoded(photo, "JPEG", quality=80) for photo in photos[:20]]
    images, splits = [*originals, *versions], ["test"] * 10 + ["train"] * 50
    # So that the counts are of the parameter: 30 originals and 20 versions train, and ten drawn anew.
    extra = [encoded(photograph(seed)) for seed in range(100, 110)]
    images, splits = images + extra, splits + ["train"] * 10
    (tmp_path / "photos").mkdir()
    columns = {"image": images, "hashtags": [["a", "b"]] * len(images), "part": splits}
    pq.write_table(pa.table(columns), tmp_path / "photos" / "0.parquet")
    settings = {"split_column": "part", "near_duplicates": setting}
    root = partition(tmp_path, dataset=settings, partition={"experts": 2})
    assert payload(root)["sizes"] == {"train": train_left, "validation": 0, "test": 10}
    held_out = {row["example_id"] for row in table(root, "dataset/split=test/*.parquet")}
    assert held_out == {content_id(data) for data in originals[:10]}
    trained_on = {row["example_id"] for row in table(root, "dataset/split=train/*.parquet")}
    assert {content_id(data) for data in [*originals[20:], *extra]} <= trained_on, "what has no double stays"
    listed = table(root, "dataset/duplicates/*.parquet")
    if setting == "none":
        assert listed == [] and payload(root)["near_duplicates"] is None
        return
    assert trained_on.isdisjoint(content_id(data) for data in versions[:10])
    removed = {row["example_id"] for row in listed if row["removed"]}
    assert removed == {content_id(data) for data in images} - trained_on - held_out
    assert payload(root)["near_duplicates"]["removed"] == {"train": 60 - train_left, "validation": 0, "test": 0}


@pytest.mark.parametrize("settings", [{}, {"store": "reference"}, {"store_size": 40}], ids=["copy", "reference", "scaled"])
def test_of_training_near_duplicates_the_largest_image_stays_with_its_own_hashtags(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """The smallest id stayed: a thumbnail as likely as the photo that it was made from."""
    import pyarrow as pa

    rows: list[tuple[bytes, str, str]] = []
    best = []
    for seed in range(12):
        large, small = photograph(seed, 96), photograph(seed, 64)
        versions = [encoded(large), encoded(large, "JPEG", quality=90), encoded(small), encoded(small, "JPEG", quality=90)]
        best.append(max(versions[:2], key=len))
        rows += [(data, f"{seed}-{number}", "train") for number, data in enumerate(versions)]
    rows += [(encoded(photograph(seed)), "held", "test") for seed in range(100, 106)]
    (tmp_path / "photos").mkdir()
    columns = {"image": [r[0] for r in rows], "hashtags": [[r[1], "a"] for r in rows], "part": [r[2] for r in rows]}
    pq.write_table(pa.table(columns), tmp_path / "photos" / "0.parquet")
    dataset = {"split_column": "part", "near_duplicates": "all", **settings}
    root = partition(tmp_path, dataset=dataset, partition={"experts": 2}, hashtags={"min_count": 2})
    kept = {row["example_id"]: row["tags"] for row in table(root, "dataset/split=train/*.parquet")}
    tags = {content_id(data): sorted(["a", tag]) for data, tag, _ in rows}
    assert kept == {content_id(data): tags[content_id(data)] for data in best}


def test_images_are_stored_scaled_down_and_named_by_what_they_were(tmp_path: Path) -> None:
    big = [encoded(photograph(seed, 96), "JPEG" if seed % 2 else "PNG") for seed in range(30)]
    small = [encoded(photograph(seed, 40)) for seed in range(100, 110)]
    images = [RawExample(data, ("a", "b"), "") for data in [*big, *small]]
    write_photos(tmp_path / "photos", images)
    root = partition(tmp_path, dataset={"store_size": 48, "near_duplicates": "none"}, partition={"experts": 2})
    stored = {row["example_id"]: row["image"] for row in table(root, "dataset/split=*/*.parquet")}
    assert set(stored) == {content_id(row.image) for row in images}
    for number, data in enumerate(big):
        with Image.open(io.BytesIO(stored[content_id(data)])) as image:
            assert image.size == (48, 48)
            assert image.format == ("JPEG" if number % 2 else "PNG")
    assert all(stored[content_id(data)] == data for data in small)


def folder_of(directory: Path, names: dict[str, bytes], table: str | None) -> dict[str, Any]:
    """Pictures in a folder, and perhaps a table of hashtags; returns the recipe's section."""
    for name, data in names.items():
        path = directory / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    section: dict[str, Any] = {"source": "folder", "path": "pictures"}
    if table is not None:
        (directory / "tags.csv").write_text(table)
        section["tags_path"] = "tags.csv"
    return section


@pytest.mark.parametrize(
    ("table", "sentences"),
    [
        (None, ("none of the 20 images below", "lies in a folder whose name", "set dataset.tags_path")),
        ("path,hashtags\npictures/00.png,a\n", ("gives any of the 20 images", "no such file (1)", "relative to dataset.path")),
        ("path,hashtags\n00.png,\n", ("gives any of the 20 images", "dataset.tags_column must name its column")),
    ],
)
def test_folder_whose_hashtags_are_not_found_is_told_before_anything_is_written(
    tmp_path: Path, table: str | None, sentences: tuple[str, ...]
) -> None:
    pictures = {f"{number:02d}.png": row.image for number, row in enumerate(IMAGES[:20])}
    write_recipe(tmp_path, dataset=folder_of(tmp_path, pictures, table))
    sentence = refusal(invoke(tmp_path, "partition", "--backend", "inline"))
    assert all(part in sentence for part in sentences), sentence
    assert not (tmp_path / "runs" / "small" / "dataset" / "artifact.json").exists()


def test_near_duplicates_that_leave_nothing_to_train_on_are_named_as_the_reason(tmp_path: Path) -> None:
    import pyarrow as pa

    images = [encoded(photograph(0)), *(encoded(photograph(0), "JPEG", quality=quality) for quality in range(60, 95))]
    (tmp_path / "photos").mkdir()
    columns = {"image": images, "hashtags": [["a"]] * len(images), "part": ["test"] + ["train"] * (len(images) - 1)}
    pq.write_table(pa.table(columns), tmp_path / "photos" / "0.parquet")
    write_recipe(tmp_path, dataset={"split_column": "part"})
    sentence = refusal(invoke(tmp_path, "partition", "--backend", "inline"))
    assert sentence.startswith("no example is left for training, since all 35 training images nearly equal others;")
    assert "dataset.near_duplicates: none" in sentence


def test_near_duplicates_of_named_examples_are_listed_by_their_names(tmp_path: Path) -> None:
    import pyarrow as pa

    images = [encoded(photograph(seed)) for seed in range(12)]
    images += [encoded(photograph(seed), "JPEG", quality=80) for seed in range(3)]
    names = [f"photo-{number}" for number in range(len(images))]
    (tmp_path / "photos").mkdir()
    splits = ["test"] * 3 + ["train"] * 12
    columns = {"image": images, "hashtags": [["a", "b"]] * len(images), "name": names, "part": splits}
    pq.write_table(pa.table(columns), tmp_path / "photos" / "0.parquet")
    root = partition(tmp_path, dataset={"id_column": "name", "split_column": "part"}, partition={"experts": 2})
    ids = {name: hashlib.sha256(f"key:{name}".encode()).digest()[:16] for name in names}
    listed = {row["example_id"]: row for row in table(root, "dataset/duplicates/*.parquet")}
    assert set(listed) == {ids[names[k]] for k in (0, 1, 2, 12, 13, 14)}
    assert {row["example_id"] for row in listed.values() if row["removed"]} == {ids[names[k]] for k in (12, 13, 14)}
    assert all(listed[ids[names[k]]]["group"] == listed[ids[names[k + 12]]]["group"] for k in range(3))
    assert set(listed) <= {row["example_id"] for row in table(root, "dataset/origin/*.parquet")}


def test_same_run_on_several_workers_writes_the_same_records(tmp_path: Path) -> None:
    """References and near-duplicates over Ray: what inline writes, byte for byte."""
    write_photos(tmp_path / "photos", IMAGES[:120])
    settings: dict[str, Any] = {"dataset": {"store": "reference", "near_duplicates": "all", "shard_rows": 32}}
    roots = []
    for backend in ("inline", "ray"):
        write_recipe(tmp_path, **merged({"root": f"runs/{backend}", "hashtags": {"min_count": 2}}, settings))
        result = invoke(tmp_path, "partition", "--backend", backend)
        assert result.returncode == 0, result.stderr
        roots.append(records(tmp_path / "runs" / backend))
    assert roots[0] == roots[1]
