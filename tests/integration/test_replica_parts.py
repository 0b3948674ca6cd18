"""`serving.replicas` without Ray: a gate and a holder of experts in this process give what the mixture gives."""

import asyncio
import gc
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from hardmoe.artifacts.store import ArtifactStore
from hardmoe.mixture import Judged, Mixture
from hardmoe.models.backbones import TagClassifier
from hardmoe.serving.ray_app import gpu_share, most_experts
from hardmoe.serving.replicas import Features, Gate, Holder, Travelling
from hardmoe.storage import open_storage


@pytest.fixture(scope="module")
def images(finished: Path) -> list[bytes]:
    return pq.read_table(finished / "photos" / "0.parquet", use_threads=False)["image"].to_pylist()[:24]


@pytest.mark.parametrize("which", ["root", "branched"])
def test_gate_and_holder_give_what_the_mixture_gives(which: str, images: list[bytes], request: pytest.FixtureRequest) -> None:
    """Requests of one image and of several, at the same time; each expert is asked once for all that came together."""
    store = ArtifactStore(open_storage(str(request.getfixturevalue(which))))
    mixture, other = Mixture(store), Mixture(store)
    pixels, expected = mixture.pixels(images), mixture.embed(images)
    asked: list[int] = []

    async def main() -> list[tuple[Judged, Features]]:
        holder, networks = Holder(other), dict[int, TagClassifier]()

        async def ask(number: int, some: Travelling) -> Features:
            asked.append(number)
            if number not in networks:
                networks[number] = await holder.load(number)
            for array in (some.pixels_n3SS, some.maps_nCHW):  # as Ray passes them on
                if array is not None:
                    array.flags.writeable = False
            return await holder.features(number, networks[number], some)

        gate = Gate(mixture, ask)
        sizes = [1, 5, 1, 2, 15]
        starts = np.cumsum([0, *sizes]).tolist()
        answers = await asyncio.gather(*(gate.embed(pixels[at : at + size]) for at, size in zip(starts, sizes, strict=False)))
        assert holder.num_held == len(networks) > 1
        networks.clear()
        gc.collect()
        assert holder.num_held == 0, "what Serve evicts is still held"
        gate.check_health()
        holder.check_health()
        return answers

    answers = asyncio.run(main())
    experts, features = np.concatenate([each.experts_N for each, _ in answers]), np.concatenate([each for _, each in answers])
    assert not any(each.refused_N.any() for each, _ in answers)
    assert experts.tolist() == mixture.route(images).tolist()
    np.testing.assert_allclose(mixture.align(torch.from_numpy(features), experts), expected, rtol=1e-5, atol=1e-5)
    assert len(asked) < 2 * len(set(asked)) + 1, "the first request goes alone, all others together"
    assert "trunk" not in other.__dict__ and "decoder" not in other.__dict__


def test_budget_of_memory_is_so_many_experts(root: Path) -> None:
    store, size = ArtifactStore(open_storage(str(root))), (root / "experts/expert-0000/model.safetensors").stat().st_size
    assert most_experts(store, None) == -1
    assert [most_experts(store, share * size / 2**30) for share in (0.1, 1.0, 2.5)] == [1, 1, 2]


def test_replicas_share_gpus_where_there_are_too_few() -> None:
    assert [gpu_share(*each) for each in ((0, 4), (8, 4), (4, 4), (2, 4), (1, 2), (1, 4), (1, 64))] == [
        0.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.125,
    ]  # fmt: skip
