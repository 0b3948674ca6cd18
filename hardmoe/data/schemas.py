"""Schemas of the tables in a run's root (a contract: other people's scripts read them)."""

import pyarrow as pa

from hardmoe.tables import ID_TYPE

EXAMPLES = pa.schema([("example_id", ID_TYPE), ("image", pa.binary()), ("tags", pa.list_(pa.string()))])
"""`dataset/split=…`: encoded image, raw hashtags."""
ORIGIN = pa.schema([("example_id", ID_TYPE), ("source_uri", pa.string())])
"""`dataset/origin`: where every copy of an example came from."""
QUARANTINE = pa.schema([("source_uri", pa.string()), ("reason", pa.string())])
"""`dataset/quarantine`: rows that could not be used, and why."""
SOURCE_FILES = pa.schema([("name", pa.string()), ("size", pa.int64()), ("sha256", pa.string())])
"""`dataset/source.parquet`: the external files that the examples came from; their digest identifies the source."""
INGESTED = pa.schema(
    [
        ("content_id", ID_TYPE),
        ("image", pa.binary()),
        ("tags", pa.list_(pa.string())),
        ("source_uri", pa.string()),
        ("key", pa.string()),
        ("split", pa.string()),
    ]
)
"""Between the two phases of the dataset stage."""
TAGS = pa.schema([("index", pa.int32()), ("tag", pa.string()), ("count", pa.int64())])
"""`vocabulary/tags.parquet`."""
LABELS = pa.schema([("example_id", ID_TYPE), ("tags", pa.list_(pa.int32()))])
"""`vocabulary/labels`: canonical tag indices, ascending."""
UNLABELLED = pa.schema([("example_id", ID_TYPE), ("reason", pa.string())])
"""`vocabulary/unlabelled`: examples without a tag of the vocabulary, and why."""
FEATURES = pa.schema([("example_id", ID_TYPE), ("feature", pa.list_(pa.float16()))])
"""`features/split=…`: a float16 vector of one length per example."""
PART = pa.schema([("example_id", ID_TYPE), ("image", pa.binary()), ("tags", pa.list_(pa.string())), ("distance", pa.float32())])
"""`partition/split=…/expert=…`: the examples of one part; distance to the part's centroid in the router's space."""
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
"""`partition/assignments`: which part an example is in; `second` is the next nearest, -1 (and NaN away) if there is none."""
EMBEDDINGS = pa.schema([("example_id", ID_TYPE), ("expert", pa.int32()), ("embedding", pa.list_(pa.float16()))])
"""`embeddings/split=…`: the expert's own features, before alignment."""

SPLITS = ("train", "validation", "test")
