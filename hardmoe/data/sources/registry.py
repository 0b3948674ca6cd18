"""Opening a source by the name that the recipe gives.

Sources are entry points of the group `hardmoe.sources`, so an installed package adds one without a change here. The
built-in ones are also listed below and win: a checkout that is not installed works, and no package can quietly replace
`parquet`. Rejected: a decorator that registers at import, which needs somebody to import every source first.
"""

from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points

from hardmoe.data.config import DatasetConfig
from hardmoe.data.sources.base import Source
from hardmoe.errors import RecipeError

GROUP = "hardmoe.sources"

_BUILT_IN = {
    "folder": "hardmoe.data.sources.folder:FolderSource",
    "huggingface": "hardmoe.data.sources.huggingface:HuggingFaceSource",
    "iconify": "hardmoe.data.sources.iconify:IconifySource",
    "icons": "hardmoe.data.sources.icons:IconsSource",
    "parquet": "hardmoe.data.sources.parquet:ParquetSource",
    "webdataset": "hardmoe.data.sources.webdataset:WebDatasetSource",
    "yfcc100m": "hardmoe.data.sources.yfcc100m:Yfcc100mSource",
}


def known_sources() -> dict[str, EntryPoint]:
    """Every source that can be named in a recipe, built-in and installed, sorted by name."""
    found = {entry.name: entry for entry in entry_points(group=GROUP)}
    found |= {name: EntryPoint(name, value, GROUP) for name, value in _BUILT_IN.items()}
    return dict(sorted(found.items()))


def open_source(config: DatasetConfig) -> Source:
    """Open the source that `config.source` names.

    Raises:
        RecipeError: no source has that name, or the package that offers it cannot be imported.
        DataError: the source cannot be opened as the config asks.
    """
    known = known_sources()
    entry = known.get(config.source)
    if entry is None:
        nearest = get_close_matches(config.source, known, n=1)
        suggestion = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise RecipeError(f"dataset.source {config.source!r} is not one of {', '.join(known)}{suggestion}")
    try:
        factory = entry.load()
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"dataset.source {config.source!r} ({entry.value}) cannot be loaded: {error}; reinstall it") from error
    source: Source = factory(config)
    return source
