"""Opening sources by name: built-in, installed, unknown, broken."""

import importlib.metadata
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from hardmoe.data.config import DatasetConfig
from hardmoe.data.sources import registry
from hardmoe.errors import RecipeError

BUILT_IN = ["folder", "huggingface", "iconify", "icons", "parquet", "webdataset", "yfcc100m"]


def install(monkeypatch, **sources):
    entries = [importlib.metadata.EntryPoint(name, value, registry.GROUP) for name, value in sources.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries if group == registry.GROUP else [])


def test_built_in_sources_are_known_without_an_installation(monkeypatch):
    install(monkeypatch)
    assert list(registry.known_sources()) == BUILT_IN
    assert type(registry.open_source(DatasetConfig(source="icons"))).__name__ == "IconsSource"


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_source_can_be_imported_and_is_an_entry_point_of_the_package(name):
    entry = registry.known_sources()[name]
    assert isinstance(entry.load(), type)
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][registry.GROUP][name] == entry.value


def test_installed_source_is_opened_with_the_config(monkeypatch):
    install(monkeypatch, mine="types:SimpleNamespace", dictionary="builtins:dict")
    config = DatasetConfig(source="dictionary")
    assert registry.open_source(config) == dict(config)
    assert registry.known_sources()["mine"].load() is SimpleNamespace


def test_installed_package_cannot_replace_a_built_in_source(monkeypatch):
    install(monkeypatch, parquet="types:SimpleNamespace")
    assert registry.known_sources()["parquet"].value == "hardmoe.data.sources.parquet:ParquetSource"


def test_unknown_source_lists_the_known_ones_and_suggests_the_nearest(monkeypatch):
    install(monkeypatch, album="types:SimpleNamespace")
    with pytest.raises(
        RecipeError, match=r"'parket' is not one of album, folder, .*, parquet, .*; did you mean 'parquet'"
    ) as caught:
        registry.open_source(DatasetConfig(source="parket"))
    assert caught.value.exit_code == 1
    with pytest.raises(RecipeError, match=r"is not one of album, folder, .*, webdataset, yfcc100m$"):
        registry.open_source(DatasetConfig(source="zzz"))


@pytest.mark.parametrize("value", ["no_such_package:Source", "types:NoSuchSource"])
def test_source_that_cannot_be_imported_is_named_with_its_place(monkeypatch, value):
    install(monkeypatch, broken=value)
    with pytest.raises(RecipeError, match=f"'broken' .{value}. cannot be loaded"):
        registry.open_source(DatasetConfig(source="broken"))
