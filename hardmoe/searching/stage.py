"""Declaration of the stage `index`: in a run's root over its examples, or beside the tables of `hardmoe embed`. Pure data.

Rejected: an index as a part of every run, which costs the images of large ones a second reading for their thumbnails.
"""

from dataclasses import dataclass

from hardmoe.stage import Resources, Stage

INDEX = "index"
INDEX_FILE, ROWS_FILE, THUMBNAILS_FILE = "index.faiss", "rows.parquet", "thumbnails.parquet"


@dataclass(frozen=True)
class IndexRequest:
    """What is to be indexed, and how."""

    root: str
    """Of the mixture's run."""
    mixture: str
    """`Mixture.identity()`."""
    vectors: str | None
    """Root that holds `embeddings`; None for the run's own examples."""
    record: str
    """Digest of the record of those embeddings."""
    kind: str | None = None
    """`flat`, `ivf` or `ivfpq`; None to go by the number of vectors."""
    recall: float = 0.95
    """Share of the ten nearest neighbours that is to be found."""


def index_stage(request: IndexRequest, num_threads: int) -> Stage:
    """The stage that makes an index."""
    asked = {"kind": request.kind, "recall": request.recall}
    return Stage(
        name=INDEX,
        kind=INDEX,
        version=1,
        config={"asked": asked, "mixture": request.mixture, "embeddings": {"record": request.record}},
        operational={"root": request.root, "vectors": request.vectors},
        work="hardmoe.searching.work:IndexWork",
        resources=Resources(num_cpus=num_threads),
    )
