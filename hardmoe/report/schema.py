"""What the report page shows, as plain JSON: `ReportData` is stored as `report/data.json`, `ReportProvenance` is not.

`ReportData` is a function of the run's artifacts alone, so the report's record can vouch for it; everything that differs
from one execution to the next (times, hosts, versions) is in `ReportProvenance`. Shares and metrics are fractions in
[0, 1], never per cent. Rejected: pydantic models, which would validate what our own stages wrote and would need an alias
for every metric name, `precision@1` being no Python identifier.
"""

from typing import Any, NotRequired, TypedDict


class Metric(TypedDict):
    """A value with its 95 % bootstrap interval; `value` is null, with a `reason`, where it cannot be computed."""

    value: float | None
    low: NotRequired[float | None]
    high: NotRequired[float | None]
    reason: NotRequired[str | None]


class Cost(TypedDict):
    """What a system takes: operations are floating-point ones, `flops` those of one image in use."""

    parameters: int
    active_parameters: int
    routed_flops: NotRequired[int]
    flops: int
    images_seen: int
    training_flops: int
    teacher_flops: NotRequired[int]


FrequencyBand = TypedDict("FrequencyBand", {"tags": int, "labels": int, "recall@10": float | None})
"""Hashtags that together have a fifth of all training labels."""


class Breakdown(TypedDict):
    """Where a system is right; `bins` has what its calibration error is computed from."""

    calibration_error: float
    bins: list[Any]
    frequency_bands: list[FrequencyBand]


class ProbedSystem(TypedDict):
    """What was fitted to a system's space, or the `reason` why nothing was; metrics by probe; shares of right neighbours."""

    fitted: dict[str, Any]
    linear: dict[str, Metric]
    knn: dict[str, Metric]
    neighbours: NotRequired[dict[str, Metric]]


class Probed(TypedDict):
    """What probes say of one collection: images and tags that count, systems, and differences keyed `"mixture - dense"` by probe.

    `dataset` is what became of a second dataset's rows.
    """

    images: dict[str, int]
    tags: int
    systems: dict[str, ProbedSystem]
    differences: dict[str, dict[str, dict[str, Metric]]]
    dataset: NotRequired[dict[str, Any]]


class Abstention(TypedDict):
    """What the mixture is worth if it refuses images.

    A point of the curve has its `coverage`, of each rule the share of test images `answered` and the `precision@1` of those, and
    their `difference`; `area` is what lies above the curves. There is no curve where there was no validation image.
    """

    area: dict[str, Metric]
    examples: NotRequired[int]
    curve: NotRequired[list[dict[str, Any]]]


class Metrics(TypedDict):
    """Metrics by system and by name, and the paired differences, keyed `"mixture - dense_refit"`.

    `retrieval` has the shares of right neighbours in the systems' spaces, keyed `"neighbours@10:other"`; `transfer` what probes
    make of those spaces, keyed `"own_images"` and `"second_dataset"`.
    """

    systems: dict[str, dict[str, Metric]]
    num_test_examples: int
    differences: dict[str, dict[str, Metric]]
    breakdown: NotRequired[dict[str, Breakdown]]
    costs: NotRequired[dict[str, Cost]]
    retrieval: NotRequired[dict[str, dict[str, Metric]]]
    retrieval_differences: NotRequired[dict[str, dict[str, Metric]]]
    transfer: NotRequired[dict[str, Probed]]
    abstention: NotRequired[Abstention]


class Sizes(TypedDict):
    """Number of examples per split."""

    train: int
    validation: int
    test: int


class TagCount(TypedDict):
    """A canonical tag and the number of training examples that carry it."""

    tag: str
    count: int


class TagLift(TagCount):
    """A tag of one part; `lift` is its share in the part divided by its share in the whole training set."""

    lift: float


class DatasetFacts(TypedDict):
    """What was read, kept and set aside."""

    sizes: Sizes
    source: str
    quarantined: int
    quarantine_reasons: dict[str, int]
    without_tags: int
    copies_merged: int
    near_duplicates_removed: int | None
    num_tags: int
    top_tags: list[TagCount]
    dropped_tags: int
    dropped_reasons: dict[str, int]


Reseeded = TypedDict("Reseeded", {"pass": int, "expert": NotRequired[int], "fine_cluster": NotRequired[int]})
"""An expert's part, or a fine cluster of it, that ran empty in a pass of k-means and was given a new centroid."""


class Projected(TypedDict):
    """Principal directions that features are projected on: `components` of the features' `of` dimensions, and the share of their
    variance that lies along them. `kind` is `pca` or `whiten`.
    """

    kind: str
    components: int
    of: int
    explained: float


class RouterFit(TypedDict):
    """How the k-means fit went: the objective after every pass (empty for a random partition).

    `zero_vectors` is the number of training features without a direction, null where nobody counted them. `fine_clusters` says of
    how many clusters each part was put together, where it was.
    """

    objective: list[float]
    converged: bool
    reseeded: list[Reseeded]
    experts: int
    zero_vectors: int | None
    transform: NotRequired[Projected]
    fine_clusters: NotRequired[list[int]]


class Distances(TypedDict):
    """Distances to the centroid: counts in bins of equal width from `low` to `high`, and quantiles of all parts together."""

    low: float
    high: float
    counts: list[int]
    quantiles: dict[str, float]


class PartitionFacts(TypedDict):
    """How the partition as a whole is; all but `variation` from the sample that was `looked_at`.

    `variation` is the standard deviation of the parts' sizes divided by their mean. `bordering` is the share of images to which
    another part's centroid is at most 10 % farther away than the nearest. `tag_bits` is the mutual information of hashtag and
    part per occurrence, `tag_chance_bits` what it is for parts dealt out by lot, `tag_entropy_bits` the hashtags' entropy.
    `bordering` and `distances` are null for a random partition.
    """

    looked_at: int
    variation: float | None
    bordering: float | None
    tag_bits: float
    tag_chance_bits: float
    tag_entropy_bits: float
    distances: Distances | None


class Balance(TypedDict):
    """How parts of limited size were filled: costs are sums of squared distances, `lower_bound` is below any that is possible.

    `serve_elsewhere` counts, by part, the training images that are nearer to another part's centroid, where they would be served.
    """

    capacity: int
    cost: float
    unconstrained_cost: float
    lower_bound: float
    serve_elsewhere: list[int]


class Exemplar(TypedDict):
    """One image of a part; borderline ones also name the `second` nearest expert and the `ratio` of the two distances."""

    example_id: str
    tags: list[str]
    image: str
    distance: float
    second: NotRequired[int]
    ratio: NotRequired[float]


class PartDistances(TypedDict):
    """A part's distances to its centroid: counts in the bins of `Distances`, and quantiles by their per cent."""

    counts: list[int]
    quantiles: dict[str, float]


class Part(TypedDict):
    """One expert's share of the dataset; `extra` counts the training images of other parts that its expert sees as well."""

    expert: int
    sizes: Sizes
    extra: NotRequired[int]
    mean_distance: float | None
    distances: PartDistances | None
    tags: list[TagLift]
    typical: list[Exemplar]
    borderline: list[Exemplar]


CurvePoint = TypedDict(
    "CurvePoint",
    {"step": int, "examples": int, "loss": float | None, "validation_precision@1": NotRequired[float | None]},
)
"""One line of a network's `metrics.jsonl`."""


class Network(TypedDict):
    """One trained network; `features` is the width of its embedding, `samples_per_epoch` the mean over the epochs."""

    name: str
    backbone: str
    parameters: int
    unique_examples: int
    samples_per_epoch: float
    examples_seen: int
    features: int


class ReportData(TypedDict):
    """Everything on the page that the run's artifacts decide."""

    recipe: dict[str, Any]
    dataset: DatasetFacts
    metrics: Metrics
    router: RouterFit
    partition: PartitionFacts
    balance: NotRequired[Balance]
    parts: list[Part]
    curves: dict[str, list[CurvePoint]]
    networks: list[Network]


class StageTime(TypedDict):
    """How long one artifact took; `units` is the number of its independent pieces."""

    artifact: str
    seconds: float
    units: int
    started: str


class ReportProvenance(TypedDict):
    """Who ran what, where and for how long."""

    title: str
    command: str
    commit: str | None
    host: str
    versions: dict[str, str]
    finished: str
    stages: list[StageTime]
    total_seconds: float
