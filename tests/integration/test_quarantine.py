"""Images that are no images, copies, images without a hashtag: counted and listed, never fatal, every row accounted for."""

import hashlib
import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import invoke, payload, real_images, refusal, succeed, write_recipe

Row = tuple[bytes | None, list[str] | None]


def claims_to_be_huge(side: int = 60_000) -> bytes:
    """A PNG of a hundred bytes whose header promises so many pixels a side."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def half_a_photo() -> bytes:
    """A JPEG whose upload was cut off."""
    target = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(target, "JPEG", quality=90)
    return target.getvalue()[:900]


BROKEN: list[bytes | None] = [
    None,
    b"",
    b"<html>404 Not Found</html>",
    claims_to_be_huge(),
    half_a_photo(),
    b"\x89PNG\r\n\x1a\n",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
]


def write(project: Path, rows: Sequence[Row], name: str = "0.parquet", **columns: Sequence[Any]) -> Path:
    """Write rows of image and hashtags, and further columns, as a Parquet file of the project."""
    (project / "photos").mkdir(exist_ok=True)
    images = pa.array([image for image, _ in rows], pa.binary())
    tags = pa.array([tags for _, tags in rows], pa.list_(pa.string()))
    pq.write_table(pa.table({"image": images, "hashtags": tags, **columns}), project / "photos" / name, row_group_size=64)
    return project / "photos" / name


def build_dataset(project: Path, **changes: Any) -> Path:
    """Build the dataset by the command line and stop: no hashtag is on a million images. Returns the root."""
    write_recipe(project, hashtags={"min_count": 1_000_000}, **changes)
    assert "hashtags.min_count=1000000" in refusal(invoke(project, "partition", "--backend", "inline"))
    return project / "runs" / "small"


def table(root: Path, pattern: str) -> list[dict[str, Any]]:
    return [row for path in sorted(root.glob(pattern)) for row in pq.read_table(path).to_pylist()]


def content_id(image: bytes) -> bytes:
    return hashlib.sha256(image).digest()[:16]


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Row]]:
    """A collection as collections are, brought to its partition by the command line; root and rows of the source."""
    good: list[Row] = [(example.image, list(example.tags)) for example in real_images(200)]
    good[7] = (good[7][0], [])
    good[8] = (good[8][0], None)
    good[9] = (good[9][0], ["only-this-one-has-it"])
    copies: list[Row] = [(image, ["seen-twice"]) for image, _ in good[20:32]]
    copies.append((good[20][0], ["Seen_Twice", "thrice"]))
    rows = [*good, *((image, ["thin"]) for image in BROKEN), *copies]
    project = tmp_path_factory.mktemp("messy")
    # Copies and originals lie in different files, as they do in a crawl.
    write(project, rows[:150])
    write(project, rows[150:], "1.parquet")
    write_recipe(project)
    succeed(project, "partition", "--backend", "inline")
    return project / "runs" / "small", rows


def test_every_row_becomes_an_example_merges_into_one_or_is_quarantined(messy: tuple[Path, list[Row]]) -> None:
    root, rows = messy
    found = payload(root, "dataset")
    assert found["quarantined"] == len(BROKEN)
    assert found["copies_merged"] == 13
    assert sum(found["sizes"].values()) == 200
    assert len(rows) == sum(found["sizes"].values()) + found["copies_merged"] + found["quarantined"]
    examples = table(root, "dataset/split=*/*.parquet")
    assert {row["example_id"] for row in examples} == {content_id(image) for image, _ in rows if image not in BROKEN}
    assert len(examples) == 200
    assert sum(map(sum, payload(root, "partition")["sizes"].values())) == 200, "the partition has all of them"


def test_quarantine_lists_every_broken_image_with_its_place_and_a_reason_for_people(messy: tuple[Path, list[Row]]) -> None:
    root, rows = messy
    listed = {row["source_uri"]: row["reason"] for row in table(root, "dataset/quarantine/*.parquet")}
    places = [f"1.parquet#row={index - 150}" for index, (image, _) in enumerate(rows) if image in BROKEN]
    assert sorted(listed) == sorted(places)
    reasons = [listed[place] for place in places]
    assert reasons[0] == "null image"
    assert reasons[1] == "empty file"
    assert reasons[2].startswith("not an image in a known format")
    assert "more than dataset.max_pixels" in reasons[3] or "more pixels than dataset.max_pixels" in reasons[3]
    assert reasons[4] == "broken image (Premature end of JPEG file)"
    assert reasons[6].startswith("not an image in a known format"), "PostScript would be handed to an external program"
    counted = payload(root, "dataset")["quarantine_reasons"]
    assert sum(counted.values()) == len(BROKEN)
    assert counted["null image"] == counted["empty file"] == 1


def test_origin_names_the_place_of_every_copy(messy: tuple[Path, list[Row]]) -> None:
    root, rows = messy
    places = [f"{0 if index < 150 else 1}.parquet#row={index % 150}" for index in range(len(rows))]
    found = zip(places, rows, strict=True)
    expected = {(content_id(image), place) for place, (image, _) in found if image is not None and image not in BROKEN}
    assert {(row["example_id"], row["source_uri"]) for row in table(root, "dataset/origin/*.parquet")} == expected


def test_copies_are_one_example_with_the_tags_of_all(messy: tuple[Path, list[Row]]) -> None:
    root, rows = messy
    tags = {row["example_id"]: row["tags"] for row in table(root, "dataset/split=*/*.parquet")}
    image, own = rows[20]
    assert image is not None and own is not None
    assert tags[content_id(image)] == sorted({*own, "seen-twice", "Seen_Twice", "thrice"}), "raw, as they came"


def test_images_without_a_known_hashtag_are_listed_with_the_reason_and_still_partitioned(messy: tuple[Path, list[Row]]) -> None:
    root, rows = messy
    listed = {row["example_id"]: row["reason"] for row in table(root, "vocabulary/unlabelled/*.parquet")}
    ids = [content_id(image) for image, _ in rows[7:10] if image is not None]
    assert [listed[identity] for identity in ids] == ["no hashtags", "no hashtags", "outside the vocabulary"]
    found = payload(root, "vocabulary")
    assert found["without_hashtags"] == payload(root, "dataset")["without_tags"] == 2
    assert found["without_hashtags"] + found["outside_vocabulary"] == len(listed)
    assigned = {row["example_id"] for row in table(root, "partition/assignments/*.parquet")}
    assert set(ids) <= assigned


def test_collection_of_nothing_but_broken_images_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path, [(image, ["a"]) for image in BROKEN])
    write_recipe(tmp_path)
    sentence = refusal(invoke(tmp_path, "run", "--backend", "inline"))
    assert f"has {len(BROKEN)} rows, none with a usable image (" in sentence
    assert sentence.endswith("; correct dataset.path and its columns")


def test_a_thousand_differently_broken_images_are_few_reasons_in_the_record(tmp_path: Path) -> None:
    """Seen: "truncated (37 bytes not processed)", a reason of its own for every photo, filled the record."""
    good: list[Row] = [(example.image, list(example.tags)) for example in real_images(40)]
    huge: list[Row] = [(claims_to_be_huge(side), ["a"]) for side in range(10_001, 10_401)]
    write(tmp_path, good + huge)
    root = build_dataset(tmp_path, dataset={"max_bad_fraction": 0.95})
    found = payload(root, "dataset")
    assert sum(found["quarantine_reasons"].values()) == found["quarantined"] == len(huge)
    assert len(found["quarantine_reasons"]) <= 5
    assert len({row["reason"] for row in table(root, "dataset/quarantine/*.parquet")}) > len(found["quarantine_reasons"])


def test_collection_that_is_mostly_broken_stops_the_run_and_says_what_is_wrong(tmp_path: Path) -> None:
    good: list[Row] = [(example.image, list(example.tags)) for example in real_images(40)]
    write(tmp_path, [*good, *((b"<html>404 Not Found</html>", ["a"]) for _ in range(41))])
    write_recipe(tmp_path)
    sentence = refusal(invoke(tmp_path, "partition", "--backend", "inline"))
    assert sentence.startswith("41 of 81 rows cannot be used, more than dataset.max_bad_fraction=0.5 (not an image in a known")
    told = "(41); 'hardmoe logs dataset' lists them); correct dataset.path and its columns, or raise max_bad_fraction"
    assert sentence.endswith(told)
    # The tables of quarantine lie in no place of their own before the dataset is finished: nobody found them.
    logs = succeed(tmp_path, "logs", "dataset")
    assert all(f"0.parquet#row={row}: not an image" in logs for row in range(40, 81)) and "row=39:" not in logs
    assert build_dataset(tmp_path, dataset={"max_bad_fraction": 0.51}).exists()


def test_split_column_decides_and_a_copy_of_a_held_out_image_is_not_trained_on(tmp_path: Path) -> None:
    good: list[Row] = [(example.image, list(example.tags)) for example in real_images(40)]
    splits = ["train"] * 30 + ["validation"] * 4 + ["test"] * 6
    write(tmp_path, [*good, good[35], good[31]], part=[*splits, "train", "train"])
    root = build_dataset(tmp_path, dataset={"split_column": "part"})
    assert payload(root, "dataset")["sizes"] == {"train": 30, "validation": 4, "test": 6}
    held_out = {row["example_id"] for row in table(root, "dataset/split=test/*.parquet")}
    assert held_out == {content_id(image) for image, _ in good[34:] if image is not None}


def test_split_that_is_none_is_refused_with_its_place(tmp_path: Path) -> None:
    good: list[Row] = [(example.image, list(example.tags)) for example in real_images(20)]
    write(tmp_path, good, part=["train"] * 18 + ["dev", "test"])
    write_recipe(tmp_path, dataset={"split_column": "part"})
    sentence = refusal(invoke(tmp_path, "run", "--backend", "inline"), 3)
    assert "0.parquet#row=18: split 'dev' in column 'part' is none of train, validation, test; correct the data" in sentence


def test_nothing_left_to_train_on_is_refused(tmp_path: Path) -> None:
    good: list[Row] = [(example.image, list(example.tags)) for example in real_images(20)]
    write(tmp_path, good, part=["test"] * 20)
    write_recipe(tmp_path, dataset={"split_column": "part"})
    sentence = refusal(invoke(tmp_path, "run", "--backend", "inline"))
    assert sentence.startswith("no example is left for training (")
    assert "test" in sentence and "20" in sentence and "dataset.split_column" in sentence


def test_id_column_names_the_examples_and_copies_under_two_ids_are_one(tmp_path: Path) -> None:
    good: list[Row] = [(example.image, list(example.tags)) for example in real_images(20)]
    write(tmp_path, [*good, good[3]], photo=[f"p{index:02d}" for index in range(20)] + ["a-copy"])
    root = build_dataset(tmp_path, dataset={"id_column": "photo"})
    found = payload(root, "dataset")
    assert (sum(found["sizes"].values()), found["copies_merged"]) == (20, 1)
    by_image = {row["image"]: row["example_id"] for row in table(root, "dataset/split=*/*.parquet")}

    def named(key: str) -> bytes:
        return hashlib.sha256(f"key:{key}".encode()).digest()[:16]

    assert by_image[good[0][0]] == named("p00")
    assert by_image[good[3][0]] == named("a-copy"), "the first of its names in the alphabet"


def test_one_id_for_two_different_images_is_refused_with_both_places(tmp_path: Path) -> None:
    """Every join in a run is by id. Seen: two images in one range of hashes were taken for copies, and only the trunk failed."""
    good: list[Row] = [(example.image, list(example.tags)) for example in real_images(20)]
    write(tmp_path, good[:10], photo=[f"p{index}" for index in range(10)])
    write(tmp_path, good[10:], "1.parquet", photo=[f"p{index}" for index in (*range(10, 19), 4)])
    write_recipe(tmp_path, dataset={"id_column": "photo"})
    sentence = refusal(invoke(tmp_path, "run", "--backend", "inline"), 3)
    assert "0.parquet#row=4 and 1.parquet#row=9 have the same 'photo' but different images" in sentence
    assert "correct the column, or leave dataset.id_column out" in sentence
