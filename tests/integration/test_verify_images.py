"""`hardmoe verify` of a dataset that refers to its images: what it says without looking at them, and what it finds."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from collection_writers import WRITERS
from support import invoke, real_images, refusal, write_recipe

EXAMPLES = real_images(200)


def build(directory: Path, section: dict[str, Any]) -> None:
    """Build the dataset, by reference, and stop at the vocabulary."""
    dataset = {"path": None, "shard_rows": 128, "near_duplicates": "none", "store": "reference", **section}
    write_recipe(directory, dataset=dataset, hashtags={"min_count": 1_000_000})
    refusal(invoke(directory, "partition", "--backend", "inline"))


def verified(directory: Path, *arguments: str) -> tuple[str, int, str]:
    """What is said of the dataset, the exit code, and the error's sentence."""
    result = invoke(directory, "verify", "dataset", *arguments)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return result.stdout.strip(), result.returncode, "".join(errors)


@pytest.mark.parametrize("kind", ["parquet", "parquet-paths", "webdataset", "folder-names"])
def test_sound_images_are_counted_and_without_the_option_said_to_be_unseen(tmp_path: Path, kind: str) -> None:
    build(tmp_path, WRITERS[kind](tmp_path / "photos", EXAMPLES))
    said, code, _ = verified(tmp_path)
    assert code == 0 and said.endswith("; its images, which are in the source, were not looked at (--images reads them)")
    said, code, _ = verified(tmp_path, "--images")
    count = len({row.image for row in EXAMPLES})
    assert code == 0 and said.endswith(f"; {count} images in the source are as they were")


def test_missing_and_altered_images_are_all_counted_and_the_first_is_named(tmp_path: Path) -> None:
    """`verify` said "ok" of a dataset half of whose photos were gone."""
    build(tmp_path, WRITERS["parquet-paths"](tmp_path / "photos", EXAMPLES))
    files = sorted((tmp_path / "photos").rglob("*.png"))
    by_content = {path.read_bytes(): path for path in files}
    chosen = [by_content[data] for data in sorted(by_content)][:60:10]
    for path in chosen[:3]:
        path.unlink()
    chosen[3].write_bytes(chosen[3].read_bytes() + b"longer")
    for path in chosen[4:]:
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    said, code, error = verified(tmp_path, "--images")
    assert said.startswith(
        f"dataset: BAD: of {len(by_content)} images in the source 4 cannot be read and 2 have other content, the "
    )
    assert any(path.name in said.rpartition("the first: ")[2] for path in chosen)
    assert code == 1 and "put the source's files back, or build from those there are now in a new root" in error
    assert verified(tmp_path)[1] == 0, "the artifact itself is sound"


def test_altered_row_of_a_parquet_file_is_told_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    victim, image = tmp_path / "photos" / "a.parquet", EXAMPLES[1].image
    columns = {"image": [row.image for row in EXAMPLES], "hashtags": [list(row.tags) for row in EXAMPLES]}
    pq.write_table(pa.table(columns), victim, compression="none", use_dictionary=False)
    build(tmp_path, {"path": str(victim)})
    whole = victim.read_bytes()
    place = whole.index(image[30:60]) + 10
    victim.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    said, code, _ = verified(tmp_path, "--images")
    assert code == 1
    assert "0 cannot be read and 1 has other content, the first: a.parquet, row 1, is not the image that was ingested" in said


def test_archive_that_was_cut_off_loses_only_what_lies_behind_the_cut(tmp_path: Path) -> None:
    build(tmp_path, WRITERS["webdataset"](tmp_path / "photos", EXAMPLES))
    victim = tmp_path / "photos" / "2.tar"
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    said, code, _ = verified(tmp_path, "--images")
    missing = int(said.partition("images in the source ")[2].partition(" cannot be read")[0])
    of_victim = len({row.image for row in EXAMPLES[2::3]})
    assert code == 1 and of_victim / 3 < missing < of_victim * 2 / 3
    assert f"{victim} ends at byte " in said


def test_source_that_is_gone_is_one_sentence_and_one_that_moved_is_found_by_the_recipe(tmp_path: Path) -> None:
    build(tmp_path, WRITERS["parquet"](tmp_path / "photos", EXAMPLES))
    (tmp_path / "photos").rename(tmp_path / "moved")
    said, code, _ = verified(tmp_path, "--images", "--root", "runs/small")
    assert code == 1 and "images are out of reach: dataset.path " in said and "matches no file" in said
    said, code, _ = verified(tmp_path, "--images", "--set", f"dataset.path={tmp_path}/moved/*.parquet")
    assert code == 0, said
