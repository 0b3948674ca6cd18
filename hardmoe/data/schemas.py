"""Schemas of the tables in a run's root (a contract: other people's scripts read them)."""

import pyarrow as pa

from hardmoe.tables import ID_TYPE

EXAMPLES = pa.schema([("example_id", ID_TYPE), ("image", pa.binary()), ("tags", pa.list_(pa.string()))])
"""`dataset/split=…`: encoded image, raw hashtags."""
REFERENCES = pa.schema(
    [
        ("example_id", ID_TYPE),
        ("file", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("content_id", ID_TYPE),
        ("tags", pa.list_(pa.string())),
    ]
)
"""`dataset/split=…` of a dataset that stores no image: where it lies in the source (`length` null: `offset` is the number of a
row), and the digest that it must have."""
PARTS = pa.schema([("example_id", ID_TYPE), ("part", pa.int32())])
"""`dataset/parts/split=…`, where `dataset.part_column` is set: the part of every example, row by row as in the shard of that
name. The record's `parts` says which value of the column each number stands for."""
PARTS_FOLDER = "parts"
ORIGIN = pa.schema([("example_id", ID_TYPE), ("source_uri", pa.string()), ("license", pa.string())])
"""`dataset/origin`: where every copy of an example came from, and under which licence."""
DUPLICATES = pa.schema(
    [("example_id", ID_TYPE), ("group", ID_TYPE), ("split", pa.string()), ("difference", pa.float32()), ("removed", pa.bool_())]
)
"""`dataset/duplicates`: images that nearly equal another one; `dataset/origin` says where each is. `group` is one of all that
hang together, `difference` the measure to the nearest of them."""
QUARANTINE = pa.schema([("source_uri", pa.string()), ("reason", pa.string())])
"""`dataset/quarantine`: rows that could not be used, and why."""
SOURCE_FILES = pa.schema([("name", pa.string()), ("size", pa.int64()), ("digest", pa.string())])
"""`dataset/source.parquet`: the external files that the examples came from, with SHA-256 or an object store's own digest."""
INGESTED = pa.schema(
    [
        ("content_id", ID_TYPE),
        ("tags", pa.list_(pa.string())),
        ("source_uri", pa.string()),
        ("license", pa.string()),
        ("key", pa.string()),
        ("split", pa.string()),
        ("part", pa.string()),
        ("shard", pa.int32()),
        ("file", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("hash", pa.uint64()),
        ("thumbnail", pa.large_binary()),
        ("pixels", pa.int64()),
        ("size", pa.int64()),
    ]
)
"""Rows of a source that can be used, between the phases of the dataset stage. The bytes lie at `offset` of the source's `file`,
or of what ingested shard number `shard` put by where `file` is null; `part` is null unless `dataset.part_column` is set, `hash`
and `thumbnail` are null unless near-duplicates are looked for. `pixels` and `size` (in bytes) are those of the image as it came,
however it is stored."""
MERGED = pa.schema(
    [
        ("content_id", ID_TYPE),
        ("example_id", ID_TYPE),
        ("split", pa.int8()),
        ("tags", pa.list_(pa.string())),
        ("part", pa.string()),
        ("shard", pa.int32()),
        ("file", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
    ]
)
"""Examples, all copies of an image in one, between the phases of the dataset stage; `split` is an index into `SPLITS`."""
TAGS = pa.schema([("index", pa.int32()), ("tag", pa.string()), ("count", pa.int64())])
"""`vocabulary/tags.parquet`."""
DROPPED_TAGS = pa.schema([("tag", pa.string()), ("count", pa.int64()), ("reason", pa.string())])
"""`vocabulary/dropped.parquet`: the hashtags that were seen and are not in the vocabulary, the commonest first, and why."""
LABELS = pa.schema([("example_id", ID_TYPE), ("tags", pa.list_(pa.int32()))])
"""`vocabulary/labels`: canonical tag indices, ascending."""
LABEL_RANGES = pa.schema([("file", pa.string()), ("split", pa.string()), ("first", ID_TYPE), ("last", ID_TYPE)])
"""`vocabulary/ranges.parquet`: for every table of labels its split, and the smallest and the largest id in it."""
UNLABELLED = pa.schema([("example_id", ID_TYPE), ("reason", pa.string())])
"""`vocabulary/unlabelled`: examples without a tag of the vocabulary, and why."""
FEATURES = pa.schema([("example_id", ID_TYPE), ("feature", pa.list_(pa.float16()))])
"""`features/split=…`: a float16 vector of one length per example."""
PART = pa.schema([("example_id", ID_TYPE), ("image", pa.binary()), ("tags", pa.list_(pa.string())), ("distance", pa.float32())])
"""`partition/split=…/expert=…`: the examples of one part; distance to the part's centroid in the router's space.
`partition/extra/expert=…`: training examples of other parts that this expert trains on as well, if the recipe asks for such."""
EXTRA_FOLDER = "extra"
ASSIGNMENTS = pa.schema(
    [
        ("example_id", ID_TYPE),
        ("split", pa.string()),
        ("expert", pa.int32()),
        ("distance", pa.float32()),
        ("second", pa.int32()),
        ("second_distance", pa.float32()),
        ("primary", pa.bool_()),
    ]
)
"""`partition/assignments`: which part an example is in; `second` is the nearest other one, -1 (and NaN away) if there is none. A
given or balanced part may be farther away than the second, which is then where the router would send the example. A row that is
not `primary` is of a copy: another expert that trains on the example as well; it has no second."""
EMBEDDINGS = pa.schema([("example_id", ID_TYPE), ("expert", pa.int32()), ("embedding", pa.list_(pa.float16()))])
"""`embeddings/split=…`: the expert's own features, before alignment."""
NEAREST = pa.schema([("example_id", ID_TYPE), ("expert", pa.int32()), ("squared_distance", pa.float64())])
"""`topk/nearest/split=…`: the k nearest experts of every held-out example, k rows one after another, the nearest first."""
NEAREST_EMBEDDINGS = NEAREST.append(pa.field("embedding", pa.list_(pa.float16())))
"""`topk/embeddings/split=…`: the same with each expert's own features."""

SPLITS = ("train", "validation", "test")
