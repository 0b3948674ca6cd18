"""`hardmoe index` and `hardmoe search`."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click

from hardmoe.artifacts.store import ArtifactStore
from hardmoe.cli.common import existing_run, format_table, printable, usable_cpus
from hardmoe.errors import DataError, RecipeError
from hardmoe.storage import open_storage


def make_index(options: Mapping[str, Any], vectors: str | None, kind: str | None, recall: float) -> None:
    """Index a run's own examples, or what `hardmoe embed` wrote, if that is missing; say how good it is."""
    from hardmoe.cli.bulk import plan_alone
    from hardmoe.execution.display import make_display
    from hardmoe.execution.inline import InlineBackend
    from hardmoe.execution.progress import Reporter
    from hardmoe.execution.runner import Runner, RunnerOptions
    from hardmoe.mixture import Mixture
    from hardmoe.searching.stage import IndexRequest, index_stage

    storage, _ = existing_run(options)
    home = storage if vectors is None else open_storage(vectors)
    store = ArtifactStore(home)
    if vectors is not None and store.find("embeddings") is None:
        raise DataError(f"there are no finished embeddings in {home.where()}; make them with 'hardmoe embed --out {vectors}'")
    embeddings, mixture = store.get("embeddings"), Mixture.load(storage.uri).identity()
    if vectors is not None and embeddings.record.config["mixture"] != mixture:
        raise DataError(f"the embeddings in {home.where()} are of another mixture than {storage.where()}; embed the images again")
    where = None if vectors is None else home.uri
    request = IndexRequest(storage.uri, mixture, where, embeddings.record_digest, kind, recall)
    plan = plan_alone(store, index_stage(request, usable_cpus()), "delete it")
    if plan.missing:
        Runner(
            store, InlineBackend, Reporter(home, make_display()), RunnerOptions(accept_versions=options["accept_versions"])
        ).run(plan)
    payload = plan.artifacts["index"].payload
    lists = f", {payload['probes']} of {payload['lists']} lists looked at" if "lists" in payload else ""
    click.echo(
        f"{payload['rows']:,} vectors of {payload['dim']} dimensions, {payload['kind']}{lists}: recall@10 "
        f"{100 * payload['recall@10']:.1f} % against exact search, of {payload['queries']} queries"
    )


def search(options: Mapping[str, Any], query: str, vectors: str | None, count: int, as_json: bool) -> None:
    """Print the nearest images of an image, or of a hashtag."""
    from hardmoe.mixture import Mixture
    from hardmoe.searching.search import SearchIndex

    if not query.strip():
        raise RecipeError("the query is empty, maybe of a shell variable that is not set; give an image's path or a '#hashtag'")
    storage, _ = existing_run(options)
    mixture = Mixture.load(storage.uri)
    index = SearchIndex.open(vectors or storage.uri, mixture)
    found = index.of_tag(query, count) if query.startswith("#") else index.of_vectors(mixture.embed([query]), count)[0]
    if as_json:
        click.echo(json.dumps([asdict(each) for each in found], indent=1, ensure_ascii=False))
        return
    rows = [
        ("cosine", "expert", "image"),
        *((f"{each.cosine:.3f}", str(each.expert), printable(each.source_uri)) for each in found),
    ]
    click.echo(format_table(rows, right=(0, 1)))
