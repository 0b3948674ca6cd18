"""What a command says, when it is through, of the data that were of no use, or are missing."""

from collections.abc import Iterator

import click

from hardmoe.artifacts.names import TRANSFER
from hardmoe.config import Json
from hardmoe.execution.plan import Plan
from hardmoe.recipe import Recipe


def tell_about_data(recipe: Recipe, plan: Plan, fresh: set[str]) -> None:
    """Say on stderr how many rows and examples were of no use, where they are listed, and what there is none of.

    Args:
        recipe: what was asked for.
        plan: what there is.
        fresh: names of the artifacts that the command built or took over.
    """
    if "dataset" in fresh:
        for line in _about_dataset(recipe, plan.artifacts["dataset"].payload):
            click.echo(line, err=True)
    if (second := f"{TRANSFER}dataset") in fresh and (count := plan.artifacts[second].payload["quarantined"]):
        click.echo(f"{count} rows of the second dataset could not be used: see {second}/quarantine in the root", err=True)
    if "vocabulary" in fresh:
        for line in _about_vocabulary(plan, plan.artifacts["vocabulary"].payload):
            click.echo(line, err=True)


def _about_dataset(recipe: Recipe, payload: Json) -> Iterator[str]:
    if count := payload["quarantined"]:
        yield f"{count} rows could not be used: see dataset/quarantine in the root"
    if (near := payload["near_duplicates"]) and (count := sum(near["removed"].values())):
        yield f"{count} near-duplicates were removed: see dataset/duplicates in the root"
    if payload["store"] == "reference" and recipe.dataset.store == "auto":
        yield "no image was copied (dataset.store: auto): keep them where they are until the run is through"
    where = "dataset.{}_fraction" if recipe.dataset.split_column is None else "the rows of dataset.split_column"
    if not payload["sizes"]["test"]:
        yield f"there are no test examples, which an evaluation needs: see {where.format('test')}"
    if not payload["sizes"]["validation"] and (recipe.dataset.validation_fraction or recipe.dataset.split_column):
        yield f"there are no validation examples to watch the training by: see {where.format('validation')}"


def _about_vocabulary(plan: Plan, payload: Json) -> Iterator[str]:
    if count := payload["without_hashtags"] + payload["outside_vocabulary"]:
        yield f"{count} examples have no hashtag of the vocabulary: see vocabulary/unlabelled in the root"
    sizes = plan.artifacts["dataset"].payload["sizes"]
    for split in ("validation", "test"):
        if sizes[split] and not payload["labelled"][split]:
            yield f"none of the {sizes[split]} {split} examples has a hashtag of the vocabulary"
