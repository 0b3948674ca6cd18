"""`hardmoe detection`: from a file of its own to detectors with experts in their heads, a table and a page.

The file is no recipe: it has sections of its own (`hardmoe/detection/config.py`), but is read, extended and overridden like one.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from hardmoe.artifacts.fingerprint import differences
from hardmoe.artifacts.store import ArtifactStore
from hardmoe.cli.build import format_interval
from hardmoe.cli.common import DETECTION_FILE, format_table, keep_description, overrides_of
from hardmoe.config import Json
from hardmoe.data.inventory import take_inventory
from hardmoe.data.sources.registry import open_source
from hardmoe.detection.config import DetectionConfig
from hardmoe.detection.stages import DETECTION, SET, detection_stages
from hardmoe.errors import DriftError, RecipeError
from hardmoe.execution.display import make_display
from hardmoe.execution.opening import open_backend
from hardmoe.execution.plan import Plan, make_plan
from hardmoe.execution.progress import Reporter
from hardmoe.execution.runner import Runner, RunnerOptions
from hardmoe.recipe import absolute_place, read_body
from hardmoe.storage import Storage, open_storage

_NAMES = ("all", "small", "medium", "large")


def run_detection(options: Mapping[str, Any], as_json: bool) -> None:
    """Build what is missing, print the table, write the page.

    Raises:
        RecipeError: the file is wrong.
        DriftError: the root holds a detection of another file.
    """
    config = read_detection(options)
    store = ArtifactStore(open_storage(config.root))
    inventory = take_inventory(open_source(config.dataset).files(), store.storage, f"{SET}/_progress/inventory.json")
    plan = _plan(store, config, inventory.digest())
    if plan.missing:
        keep_description(store.storage, DETECTION_FILE, config.model_dump(mode="json"))
        limits = RunnerOptions(config.execution.parallel, config.execution.attempts, (), options["accept_versions"])
        Runner(store, partial(open_backend, config.execution), Reporter(store.storage, make_display()), limits).run(plan)
    judged = plan.artifacts[DETECTION]
    results = json.loads(judged.storage.read_bytes(judged.path("results.json")))
    page = _publish(store.storage, results)
    click.echo(json.dumps({**_told(results), "page": page}, indent=1) if as_json else _described(results, page))


def read_detection(options: Mapping[str, Any]) -> DetectionConfig:
    """The file that a command's options name, with its overrides.

    Raises:
        RecipeError: none is named, or something in it is wrong.
    """
    path: Path | None = options["recipe_path"]
    if path is None:
        raise RecipeError("hardmoe detection reads a file of its own; name it with -f, such as -f pipelines/detection.yaml")
    try:
        config = DetectionConfig.model_validate(read_body(path, overrides_of(options)))
    except ValidationError as error:
        raise RecipeError(f"{path}: {_first_mistake(error)}") from error
    place = config.dataset.path
    if place is None or config.dataset.source == "huggingface":
        return config
    absolute = [absolute_place(each) for each in place] if isinstance(place, list) else absolute_place(place)
    return config.model_copy(update={"dataset": config.dataset.model_copy(update={"path": absolute})})


def _first_mistake(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"unknown key '{key}'; the sections are {', '.join(DetectionConfig.model_fields)}"
    said = (
        str(first["ctx"]["error"])
        if first["type"] == "value_error"
        else f"{first['msg'][0].lower()}{first['msg'][1:]}; correct it"
    )
    return f"{key}: {said}"


def _plan(store: ArtifactStore, config: DetectionConfig, source_sha256: str) -> Plan:
    stages = detection_stages(config, source_sha256)
    try:
        return make_plan(store, stages)
    except DriftError as error:
        changed = []
        for stage in stages:
            if (found := store.find(stage.name)) is not None:
                changed += differences(found.record.config, dict(stage.config))
        remedy = "name another --root, or delete it"
        raise DriftError(f"{store.storage.where()} holds another detection ({'; '.join(changed) or error}); {remedy}") from error


def _publish(storage: Storage, results: Json) -> str:
    """Write the page unless it is there already, word for word; returns where it is."""
    from hardmoe.report.detection import PAGE_PATH, render_detection

    page = render_detection(results, storage.where()).encode()
    if not storage.exists(PAGE_PATH) or storage.read_bytes(PAGE_PATH) != page:
        storage.write_bytes(PAGE_PATH, page)
    return storage.where(PAGE_PATH)


def _told(results: Json) -> dict[str, Json]:
    """What scripts read: everything but the pictures."""
    return {key: results[key] for key in ("set", "sizes", "systems", "differences")}


def _described(results: Json, page: str) -> str:
    rows = [["system", *_NAMES, "parameters", "canvases seen"]]
    for system, told in results["systems"].items():
        cells = [format_interval(told["ap"][name]) for name in _NAMES]
        rows.append([system, *cells, f"{told['training']['parameters']:,}", f"{told['training']['canvases_seen']:,}"])
    pairs = [["difference", *_NAMES]]
    pairs += [
        [name, *(format_interval(told[each], signed=True) for each in _NAMES)] for name, told in results["differences"].items()
    ]
    taken = [["head with experts", "objects", *(f"expert {number}" for number in range(_most_experts(results)))]]
    for system, told in results["systems"].items():
        for head, facts in told["experts"].items():
            for name, shares in zip(_NAMES[1:], facts["by_range"], strict=True):
                taken.append([f"{system}: {head}", name, *(f"{100 * share:.0f} %" for share in shares)])
    return "\n\n".join(
        [
            "average precision at an overlap of 0.5, per cent, with 95 % bootstrap intervals over test canvases",
            format_table(rows, right=range(1, len(rows[0]))),
            format_table(pairs, right=range(1, len(pairs[0]))),
            "which expert takes which objects: mean weight",
            format_table(taken, right=range(2, len(taken[0]))),
            f"page: {page}",
        ]
    )


def _most_experts(results: Json) -> int:
    heads = [facts for told in results["systems"].values() for facts in told["experts"].values()]
    return max(len(facts["by_range"][0]) for facts in heads)
