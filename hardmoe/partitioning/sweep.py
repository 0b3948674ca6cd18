"""One number of parts of a sweep: k-means on the sample from several seeds, and what tells numbers of parts apart.

A unit is one fit; the driver only compares the seeds' partitions. The first seed is the recipe's, so its fit starts from the
very centroids that the router would start from. What is measured says something about K only beside other K; nothing here
recommends one. Rejected: an elbow, a silhouette or a gap statistic as *the* answer, since what the parts are for, experts
that each see enough and differ enough, is not in the features alone.

Shape letters: S examples of the sample, D feature dim, K parts.
"""

import math
from collections.abc import Generator
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from hardmoe.arrays import load_arrays, save_arrays
from hardmoe.config import Json
from hardmoe.data.agreement import Contingency, tag_contingency, tag_information
from hardmoe.data.reading import tag_names
from hardmoe.hashing import derive_seed
from hardmoe.neighbours.assignment import assign
from hardmoe.neighbours.engine import choose_engine
from hardmoe.partitioning.in_memory import FitOptions, fit
from hardmoe.partitioning.sweep_sample import Sample, check_counts, load_sample
from hardmoe.stage import Completion, DriverContext, Finished, Phase, Unit, UnitContext

_NUM_TAGS = 4
"""So many hashtags say what a part is about."""


class SweepWork:
    """See the module."""

    def phases(self, context: DriverContext) -> Generator[Phase, list[Completion], Finished]:
        """Fit from every seed, then compare."""
        config = context.stage.config
        check_counts([config["parts"]], context.input("sample").payload)
        seeds = [config["seed"], *(derive_seed(config["seed"], "sweep", index) for index in range(1, config["seeds"]))]
        units = [Unit(f"seed-{index:02d}", {"seed": seed}, cost=config["parts"]) for index, seed in enumerate(seeds)]
        fitted = yield Phase("fit", units)
        parts = [load_arrays(context.storage, done.scratch["parts"])["parts"] for done in fitted]
        names = tag_names(context.input("vocabulary"))
        return Finished(
            {
                "parts": config["parts"],
                "fits": [done.payload["fit"] for done in fitted],
                "agreement": [Contingency.of(one, other).adjusted_rand_index() for one, other in combinations(parts, 2)],
                "tags": [[names[tag] for tag in tags] for tags in fitted[0].payload["tags"]],
            }
        )

    def run(self, context: UnitContext) -> Json:
        """One fit."""
        settings, parts, seed = context.stage.config["partition"], context.stage.config["parts"], context.unit.arguments["seed"]
        sample = load_sample(context)
        options = FitOptions(
            settings["max_passes"], settings["tolerance"], settings["restarts"], spherical=settings.get("spherical", False)
        )
        found = fit(sample.features_SD, sample.ids_S16, parts, seed, options)
        # Assigned once more: the fit's last objective is that of the centroids before its last step.
        assignment = assign(sample.features_SD, found.centroids_KD, choose_engine())
        save_arrays(context.scratch("parts"), {"parts": assignment.primary_N})
        information = tag_information(sample.labels, assignment.primary_N, sample.ids_S16, context.stage.config["seed"])
        outcome = {
            "objective": math.fsum(assignment.squared_distance_N) / len(sample.ids_S16),
            "sizes": np.bincount(assignment.primary_N, minlength=parts).tolist(),
            "passes": len(found.objective_per_pass),
            "converged": found.converged,
            "tag_bits": information.bits,
            "tag_chance_bits": information.chance_bits,
            "tag_entropy_bits": information.entropy_bits,
        }
        return {"fit": outcome, "tags": _telling_tags(sample, assignment.primary_N, parts)}


def _telling_tags(sample: Sample, part_S: NDArray[np.int32], num_parts: int) -> list[list[int]]:
    """Of every part the tags that contribute most to the mutual information of tag and part, most telling first."""
    table = tag_contingency(sample.labels, part_S)
    expected_C = table.first_counts()[table.first_C] * (table.second_counts()[table.second_C] / max(1, table.num_things))
    contribution_C = table.counts_C * np.log2(table.counts_C / expected_C)
    order_C = np.lexsort((table.first_C, -contribution_C))
    chosen: list[list[int]] = [[] for _ in range(num_parts)]
    for cell in order_C[contribution_C[order_C] > 0].tolist():
        part = chosen[int(table.second_C[cell])]
        if len(part) < _NUM_TAGS:
            part.append(int(table.first_C[cell]))
    return chosen
