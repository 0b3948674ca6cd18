"""The recipe's `dataset` and `hashtags` sections.

Everything that decides which bytes, tags or split an example gets is identity; only the places to read from are
operational, because an external input is identified by its content and not by where it lies. Rejected: one section per
source, which would give the same key (`path`, `tags_column`) another place for every source; a source ignores the keys
that it has no use for.

No heavy import may enter this module: the command line reads it before anything else.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from hardmoe.config import Config, added, operational

_WITHOUT_COLUMNS = ("icons", "iconify", "yfcc100m")
_WITHOUT_TABLE = ("parquet", "webdataset", "huggingface", *_WITHOUT_COLUMNS)
AUTO_COPY_BYTES = 64 * 2**30
"""Of source files; larger collections are referred to where `dataset.store` is `auto`."""
PILLOW_MAX_PIXELS = 178_956_970
"""Images with more pixels are refused by Pillow itself, whatever the recipe says."""


class DatasetConfig(Config):
    """Which examples there are, and which of them are held out."""

    source: str = "parquet"
    """Where the examples come from: `parquet`, `webdataset`, `folder`, `huggingface`, `icons`, `iconify`, `yfcc100m`, or the
    name of an installed `hardmoe.sources` entry point."""

    path: str | list[str] | None = operational(None)
    """File, folder, glob pattern or URI, or a list of them; paths are relative to the current directory."""

    image_column: str = "image"
    """Column of the images: encoded bytes, a struct with a binary field `bytes`, or strings: paths or URIs below `image_root`."""

    image_root: str | None = operational(None)
    """Folder or URI below which paths in `image_column` lie; by default the folder of the files that name them."""

    tags_column: str = "hashtags"
    """Column or field of the hashtags: a list of strings, or one string that is split at spaces, commas and semicolons."""

    tags_path: str | None = operational(None)
    """For `folder`: CSV or JSONL file of hashtags, one row per image; without it an image's folders are its hashtags."""

    id_column: str | None = None
    """Column that names each example; without it an example is named by its content."""

    split_column: str | None = None
    """Column that says `train`, `validation` or `test`; without it the content's hash decides, by the two fractions."""

    license_column: str | None = None
    """Column with each image's licence, kept in `dataset/origin`."""

    part_column: str | None = added(None)
    """Column that says which part each image is in, for `partition.method: given`: numbers from 0, or names, which are numbered
    in sorted order (`dataset/parts`)."""

    test_fraction: float = Field(0.05, gt=0.0, lt=1.0)
    """Share of the examples held out for the final metrics."""

    validation_fraction: float = Field(0.05, ge=0.0, lt=1.0)
    """Share of the examples held out for choosing anything that is chosen."""

    store: Literal["auto", "copy", "reference"] = "auto"
    """Whether the dataset holds the images or only says where they lie; `auto` copies up to 64 GiB of source files, and
    whatever a source could not read again, but no images that a table only names (Parquet of paths or URIs, `yfcc100m`)."""

    store_size: int | None = Field(None, ge=8, le=8192)
    """Images whose shorter side is longer are stored scaled down to it, as JPEG (PNG where there was no loss); null stores
    every image as it came."""

    near_duplicates: Literal["auto", "none", "held_out", "all"] = "auto"
    """Which near-duplicates to remove: `held_out`, training images that nearly equal a validation or test image, and validation
    images that nearly equal a test image; `all`, besides, all but the largest of every group of training images, whose hashtags
    are its own; `auto` is `none` for icons and else `held_out`."""

    near_radius: int = Field(4, ge=0, le=16)
    """Images whose 64-bit perceptual hashes differ in at most so many bits are compared pixel by pixel."""

    near_difference: float = Field(0.03, ge=0.0, le=1.0)
    """Compared images are near-duplicates if their 32-pixel luminances differ by no more than this, as `near_duplicates.py`
    measures it (0 equal, 1 black against white)."""

    max_bad_fraction: float = Field(0.5, ge=0.0, le=1.0)
    """If more than this share of the rows is quarantined, the run stops."""

    icon_size: int = Field(32, ge=8, le=1024)
    """Side in pixels of the squares that `icons` and `iconify` draw."""

    shard_rows: int = Field(8192, ge=1)
    """Rows of one shard of the dataset; also about how many rows of the source one unit reads. Raise it for very large
    collections: the work of regrouping grows with the square of the number of shards."""

    max_pixels: int = Field(100_000_000, ge=1, le=PILLOW_MAX_PIXELS)
    """Images with more pixels are refused as decompression bombs; above the upper bound Pillow itself refuses them."""

    @model_validator(mode="after")
    def _reads_the_table_it_is_given(self) -> Self:
        if self.tags_path is not None and self.source in _WITHOUT_TABLE:
            raise ValueError(f"tags_path is for source: folder, and '{self.source}' has its hashtags elsewhere; take it out")
        return self

    @model_validator(mode="after")
    def _has_the_column_of_parts(self) -> Self:
        if self.part_column is not None and self.source in _WITHOUT_COLUMNS:
            raise ValueError(f"part_column is for sources with columns, and '{self.source}' has none; take it out")
        return self

    @model_validator(mode="after")
    def _stores_what_it_scales(self) -> Self:
        if self.store == "reference" and self.store_size is not None:
            raise ValueError("store: reference keeps no image, so store_size has nothing to scale; set store: copy, or drop it")
        return self

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> Self:
        total = self.test_fraction + self.validation_fraction
        if total >= 1.0:
            raise ValueError(
                f"test_fraction {self.test_fraction} + validation_fraction {self.validation_fraction} = {total:g} leaves "
                "nothing to train on; make their sum less than 1"
            )
        return self


class HashtagsConfig(Config):
    """Which hashtags the networks learn."""

    min_count: int = Field(20, ge=1)
    """Hashtags on fewer training examples are dropped."""

    max_tags: int = Field(2000, ge=1)
    """At most this many hashtags are kept, the commonest first."""

    aliases: str | None = operational(None)
    """CSV or Parquet file with the columns `alias,tag`; its content, not its path, enters the vocabulary's fingerprint."""

    allow: str | None = operational(None)
    """File with one hashtag per line: only these are kept. Its content enters the fingerprint."""

    deny: str | None = operational(None)
    """File with one hashtag per line: these are dropped. Its content enters the fingerprint."""
