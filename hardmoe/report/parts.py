"""What the page says of the partition as a whole, of the router's fit, and of how far images are from their centroids."""

from markupsafe import Markup

from hardmoe.report import charts
from hardmoe.report.charts import Captions, Series
from hardmoe.report.formats import format_count, format_percent
from hardmoe.report.schema import Balance, Distances, Part, Projected, ReportData, Reseeded

_SPACE = "\N{NO-BREAK SPACE}"
_NUM_EVENTS = 6


def describe_partition(data: ReportData) -> list[tuple[str, str, str]]:
    """How even, how sharp and how telling the parts are, in words: a term, what was found, and what it means."""
    found, router, facts = data["partition"], data["router"], []
    if found["variation"] is not None:
        facts.append(("unevenness", f"{found['variation']:.2f}", "standard deviation of the sizes, divided by their mean"))
    if found["bordering"] is not None:
        meaning = "images to which another part's centroid is at most 10 % farther away than the nearest"
        facts.append(("on a border", f"{format_percent(found['bordering'])}{_SPACE}%", meaning))
    if found["tag_entropy_bits"]:
        net = found["tag_bits"] - found["tag_chance_bits"]
        share = format_percent(net / found["tag_entropy_bits"])
        meaning = (
            "what the part says about a hashtag, less what parts dealt out by lot say; and its share of all there is to know"
        )
        facts.append(("tag information", f"{net:.2f}{_SPACE}bits, {share}{_SPACE}%".replace("-", "−"), meaning))
    if fine := router.get("fine_clusters"):
        meaning = "found by k-means; those with the most images between them, for their sizes, make a part"
        facts.append(("two levels", f"{format_count(sum(fine))} fine clusters in {format_count(len(fine))} parts", meaning))
    if "balance" in data:
        facts += _describe_balance(data["balance"], data["dataset"]["sizes"]["train"])
    if "transform" in router:
        facts.append(_describe_transform(router["transform"]))
    if router["zero_vectors"] is not None:
        meaning = "training images whose features are all zero, which no direction can tell apart"
        facts.append(("features of length zero", format_count(router["zero_vectors"]), meaning))
    if router["reseeded"]:
        events = [f"{_who(event)} in pass {event['pass']}" for event in router["reseeded"]]
        more = f" and {len(events) - _NUM_EVENTS} more" if len(events) > _NUM_EVENTS else ""
        facts.append(
            (
                "clusters that ran empty" if "fine_clusters" in router else "parts that ran empty",
                ", ".join(events[:_NUM_EVENTS]) + more,
                "given a new centroid where images lay farthest from theirs",
            )
        )
    return facts


def _who(event: Reseeded) -> str:
    return f"expert {event['expert']}" if "expert" in event else f"fine cluster {event['fine_cluster']}"


def _describe_transform(projected: Projected) -> tuple[str, str, str]:
    """What distances are measured on."""
    value = f"{projected['components']} of {projected['of']}, {format_percent(projected['explained'])}{_SPACE}% of the variance"
    scaled = ", with the same variance along each," if projected["kind"] == "whiten" else ""
    return ("principal directions", value, f"what distances are measured along{scaled} after scaling to length 1")


def _describe_balance(balance: Balance, num_images: int) -> list[tuple[str, str, str]]:
    """What limiting the size of the parts cost."""
    elsewhere, least, bound = sum(balance["serve_elsewhere"]), balance["unconstrained_cost"], balance["lower_bound"]
    share = format_percent(elsewhere / max(1, num_images))
    meaning = f"training images that another expert would serve, as a part takes {format_count(balance['capacity'])} at most"
    facts = [("trained elsewhere than served", f"{format_count(elsewhere)} images, {share}{_SPACE}%", meaning)]
    if least > 0.0:
        above, proved = format_percent(balance["cost"] / least - 1.0), format_percent(balance["cost"] / bound - 1.0, 3)
        meaning = f"more squared distance than to the nearest centroids, and {proved}{_SPACE}% at most more than there must be"
        facts.append(("cost of the balance", f"{above}{_SPACE}%", meaning))
    return facts


def fit_chart(data: ReportData) -> Markup | None:
    """The sum of squared distances after each pass of the router's fit; None where there was none."""
    objective = [(float(index), value) for index, value in enumerate(data["router"]["objective"], start=1)]
    captions = Captions("chart-router", "Router: k-means objective after each pass", "pass", "objective")
    return charts.line_chart(captions, [Series("objective", objective, 0)])


def distance_chart(part: Part, overall: Distances | None) -> Markup | None:
    """A part's distances against those of all parts; None where there are none."""
    if part["distances"] is None or overall is None:
        return None
    told = ", ".join(f"{value:.3g} ({quantile} %)" for quantile, value in part["distances"]["quantiles"].items())
    captions = Captions(f"distances-{part['expert']}", f"Distances of expert {part['expert']}", note=f"Quantiles: {told}.")
    return charts.density_chart(captions, part["distances"]["counts"], overall["counts"], overall["low"], overall["high"])
