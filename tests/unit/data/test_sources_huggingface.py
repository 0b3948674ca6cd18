"""Datasets saved by Hugging Face's library: columns, class names, splits, damage, and that nothing touches a network."""

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import datasets

from hardmoe.data.config import DatasetConfig
from hardmoe.data.sources.base import BadExample, RawExample, SourceShard
from hardmoe.data.sources.huggingface import HuggingFaceSource
from hardmoe.errors import DataError

datasets.disable_progress_bars()
STRINGS = datasets.Sequence(datasets.Value("string"))
CLASSES = datasets.ClassLabel(names=["cat", "hot dog"])


def source_of(path: Path | str, **config: Any) -> HuggingFaceSource:
    return HuggingFaceSource(DatasetConfig(source="huggingface", path=str(path), **config))


def read(path: Path | str, **config: Any) -> list[RawExample | BadExample]:
    return [row for shard in source_of(path, **config).shards() for row in source_of(path, **config).read(shard)]


def table(num_rows: int = 3, features: dict[str, Any] | None = None, **columns: Any) -> datasets.Dataset:
    columns = {
        "image": [{"bytes": f"{row}".encode(), "path": None} for row in range(num_rows)],
        "hashtags": [[f"tag{row}"] for row in range(num_rows)],
    } | columns
    kinds = {"image": datasets.Image(), "hashtags": STRINGS} | (features or {})
    kinds |= {name: datasets.Value("string") for name in columns if name not in kinds}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def saved(folder: Path, dataset: datasets.Dataset | dict[str, datasets.Dataset], **options: Any) -> Path:
    dataset = datasets.DatasetDict(dataset) if isinstance(dataset, dict) else dataset
    dataset.save_to_disk(str(folder), **options)
    return folder


def test_encoded_bytes_pass_through_undecoded(tmp_path: Path) -> None:
    assert read(saved(tmp_path / "d", table(2))) == [
        RawExample(b"0", ("tag0",), "all#row=0"),
        RawExample(b"1", ("tag1",), "all#row=1"),
    ]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (["a #b", None, ""], datasets.Value("string"), [("a", "#b"), (), ()]),
        ([["a", None], [], None], STRINGS, [("a",), (), ()]),
        ([0, 1, None], CLASSES, [("cat",), ("hot dog",), ()]),
        ([0, -1, 1], CLASSES, [("cat",), (), ("hot dog",)]),
        ([[0, 1], [], [1]], datasets.Sequence(CLASSES), [("cat", "hot dog"), (), ("hot dog",)]),
    ],
)
def test_hashtags_are_strings_or_the_names_of_classes(tmp_path: Path, values: Any, kind: Any, expected: Any) -> None:
    path = saved(tmp_path / "d", table(features={"hashtags": kind}, hashtags=values))
    assert [row.tags for row in read(path)] == expected


def test_id_split_and_licence_columns(tmp_path: Path) -> None:
    parts = datasets.ClassLabel(names=["train", "test"])
    kinds = {"n": datasets.Value("int64"), "part": parts}
    path = saved(tmp_path / "d", table(features=kinds, n=[7, 8, None], part=[0, 1, 0], rights=["CC0", None, "x"]))
    rows = read(path, id_column="n", split_column="part", license_column="rights")
    assert [(row.key, row.split, row.license) for row in rows[:2]] == [("7", "train", "CC0"), ("8", "test", None)]
    assert rows[2] == BadExample("all#row=2", "null in the id column 'n'")


def test_all_splits_are_read_and_their_names_taken_where_asked_for(tmp_path: Path) -> None:
    path = saved(tmp_path / "d", {"train": table(3), "validation": table(1), "test": table(2)})
    rows = read(path)
    assert [row.source_uri for row in rows] == [
        f"{split}#row={row}" for split, n in (("train", 3), ("validation", 1), ("test", 2)) for row in range(n)
    ]
    assert {row.split for row in rows} == {None}
    assert [row.split for row in read(path, split_column="split")] == ["train"] * 3 + ["validation"] + ["test"] * 2


def test_split_of_another_name_is_refused_before_any_row_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "d", {"train": table(), "val": table()})
    assert len(read(path)) == 6
    with pytest.raises(DataError, match=r"has a split 'val', which is none of train, validation, test; save it under"):
        source_of(path, split_column="split").shards()
    with pytest.raises(DataError, match=r"no column 'part', only image, hashtags; set dataset\.split_column"):
        source_of(path, split_column="part").shards()
    with pytest.raises(DataError, match="no column 'split'"):
        source_of(saved(tmp_path / "e", table()), split_column="split").shards()


def test_column_called_split_wins_over_the_names_of_the_splits(tmp_path: Path) -> None:
    path = saved(tmp_path / "d", {"train": table(2, split=["test", "validation"])})
    assert [row.split for row in read(path, split_column="split")] == ["test", "validation"]
    path = saved(tmp_path / "e", {"train": table(1, split=["dev"])})
    with pytest.raises(DataError, match="train#row=0: split 'dev' in column 'split' is none of"):
        read(path, split_column="split")


@pytest.mark.parametrize("shard_rows", [1, 70, 1000])
def test_shards_are_ranges_over_all_files_of_a_split(tmp_path: Path, shard_rows: int) -> None:
    path = saved(tmp_path / "d", {"train": table(150), "test": table(3)}, num_shards={"train": 4, "test": 1})
    source = source_of(path, shard_rows=shard_rows)
    shards = [SourceShard(shard.name, json.loads(json.dumps(shard.items))) for shard in source.shards()]
    assert len(shards) == -(-150 // shard_rows) + -(-3 // shard_rows)
    images = [row.image for shard in shards for row in source.read(shard)]
    assert images == [f"{row}".encode() for n in (150, 3) for row in range(n)]
    assert [file.name for file in source.files()] == ["test/data-00000-of-00001.arrow"] + [
        f"train/data-0000{number}-of-00004.arrow" for number in range(4)
    ]


def test_selected_and_shuffled_rows_are_those_that_were_saved(tmp_path: Path) -> None:
    path = saved(tmp_path / "d", table(10).shuffle(seed=1).select(range(4)))
    expected = [row["bytes"] for row in table(10).shuffle(seed=1).select(range(4)).with_format("arrow")[:]["image"].to_pylist()]
    assert [row.image for row in read(path)] == expected


def test_folder_that_the_library_understands_is_read_with_the_images_that_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library's table of such a folder holds paths and no bytes."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in ("cat/1.jpg", "cat/2.jpg", "dog/3.jpg"):
        (tmp_path / "photos" / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / "train" / name).write_bytes(name.encode())
    source = source_of(tmp_path / "photos", tags_column="label", split_column="split")
    (shard,) = source.shards()
    (tmp_path / "photos" / "train" / "cat" / "2.jpg").unlink()
    assert list(source.read(shard)) == [
        RawExample(b"cat/1.jpg", ("cat",), "train#row=0", split="train"),
        BadExample("train#row=1", "no such file"),
        RawExample(b"dog/3.jpg", ("dog",), "train#row=2", split="train"),
    ]
    assert all(file.name.endswith(".arrow") for file in source.files())


def test_binary_column_is_images_and_another_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "d", table(2, {"image": datasets.Value("binary")}, image=[b"1", b"2"]))
    assert [row.image for row in read(path)] == [b"1", b"2"]
    path = saved(tmp_path / "e", table(2, {"image": datasets.Value("string")}, image=["1.jpg", "2.jpg"]))
    with pytest.raises(DataError, match=r"column 'image' is Value\('string'\), not images; set dataset\.image_column"):
        source_of(path).shards()
    with pytest.raises(DataError, match=r"no column 'img', only image, hashtags; set dataset\.image_column, perhaps to 'image'"):
        source_of(path, image_column="img").shards()


def test_path_that_is_no_dataset_is_refused_without_asking_the_hub(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder; correct the path"):
        source_of(tmp_path / "nowhere").shards()
    with pytest.raises(DataError, match="cannot be opened as a Hugging Face dataset"):
        source_of("nobody/nothing").shards()
    with pytest.raises(DataError, match="cannot be opened as a Hugging Face dataset"):
        source_of(tmp_path).shards()
    with pytest.raises(DataError, match="is a URI; copy"):
        source_of("s3://bucket/saved")
    with pytest.raises(DataError, match=r"needs dataset\.path"):
        HuggingFaceSource(DatasetConfig(source="huggingface"))


def test_empty_dataset_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "d", table(0))
    with pytest.raises(DataError, match=r"has no rows|cannot be opened"):
        source_of(path).shards()


def test_damaged_file_is_refused_naming_the_dataset(tmp_path: Path) -> None:
    path = saved(tmp_path / "d", table(50))
    (file,) = path.glob("*.arrow")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match=r"dataset\.path '.*/d' (cannot be opened|is damaged)"):
        read(path)


def test_missing_library_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without_datasets(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return imported(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(DataError, match=r"pip install 'hardmoe\[huggingface\]'"):
        source_of(tmp_path).shards()


def test_module_imports_the_library_only_when_a_dataset_is_opened() -> None:
    code = "import hardmoe.data.sources.huggingface, sys; assert 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
