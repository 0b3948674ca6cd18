"""The dataset and hashtags sections: what is identity, and what is refused at construction."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from hardmoe.data.config import DatasetConfig, HashtagsConfig


def test_only_the_places_to_read_from_are_operational():
    assert DatasetConfig.operational_fields() == {"path", "image_root", "tags_path"}
    assert HashtagsConfig.operational_fields() == {"aliases", "allow", "deny"}


def test_identity_is_frozen():
    assert DatasetConfig(path="here/*.parquet").identity() == {
        "source": "parquet",
        "image_column": "image",
        "tags_column": "hashtags",
        "id_column": None,
        "split_column": None,
        "license_column": None,
        "test_fraction": 0.05,
        "validation_fraction": 0.05,
        "store": "auto",
        "store_size": None,
        "near_duplicates": "auto",
        "near_radius": 4,
        "near_difference": 0.03,
        "max_bad_fraction": 0.5,
        "icon_size": 32,
        "shard_rows": 8192,
        "max_pixels": 100_000_000,
    }
    assert DatasetConfig(part_column="p").identity() == {**DatasetConfig().identity(), "part_column": "p"}
    assert HashtagsConfig(aliases="a.csv").identity() == {"min_count": 20, "max_tags": 2000}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("test_fraction", 0.0),
        ("test_fraction", -0.1),
        ("validation_fraction", -0.1),
        ("validation_fraction", float("nan")),
        ("shard_rows", 0),
        ("icon_size", 0),
        ("max_pixels", 0),
        ("max_pixels", 10**9),
    ],
)
def test_impossible_value_is_refused_naming_the_field(field, value):
    with pytest.raises(ValidationError, match=field):
        DatasetConfig(**{field: value})


@pytest.mark.parametrize("field", ["min_count", "max_tags"])
def test_vocabulary_without_room_is_refused(field):
    with pytest.raises(ValidationError, match=field):
        HashtagsConfig(**{field: 0})


def test_fractions_that_leave_no_training_data_are_refused_with_the_fix():
    with pytest.raises(ValidationError, match=r"test_fraction 0\.5 \+ validation_fraction 0\.5 = 1 .*make their sum less than 1"):
        DatasetConfig(test_fraction=0.5, validation_fraction=0.5)
    assert DatasetConfig(test_fraction=0.5, validation_fraction=0.0).validation_fraction == 0.0


@pytest.mark.parametrize("source", ["icons", "iconify", "yfcc100m"])
def test_column_of_parts_is_refused_where_the_source_has_no_columns(source):
    with pytest.raises(ValidationError, match=rf"part_column is for sources with columns, and '{source}' has none; take it out"):
        DatasetConfig(source=source, part_column="cluster")


def test_unknown_source_is_left_to_the_registry():
    assert DatasetConfig(source="somebody-elses").source == "somebody-elses"


def test_every_field_is_described():
    for section in (DatasetConfig, HashtagsConfig):
        assert [name for name, field in section.model_fields.items() if not field.description] == []


def test_importing_the_config_loads_nothing_heavy():
    code = "import sys, hardmoe.data.config; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "faiss", "numpy", "pyarrow", "PIL"} & set(loaded)
