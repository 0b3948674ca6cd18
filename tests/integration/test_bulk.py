"""`hardmoe predict` and `hardmoe embed`: what tables say, against the mixture itself; resumed, on Ray, with broken images."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from support import invoke, real_images, refusal, write_recipe

from hardmoe.bulk import work
from hardmoe.mixture import Mixture


@pytest.fixture(scope="module")
def root(finished: Path) -> str:
    return str(finished / "runs" / "small")


@pytest.fixture(scope="module")
def mixture(root: str) -> Mixture:
    return Mixture.load(root)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of forty images, two broken ones and a file that is none."""
    folder = tmp_path_factory.mktemp("bulk") / "pictures"
    (folder / "deeper").mkdir(parents=True)
    for number, example in enumerate(real_images(40)):
        name = f"{number:02d} [x].png" if number % 2 else f"deeper/{number:02d}.png"
        (folder / name).write_bytes(example.image)
    (folder / "broken.png").write_bytes(b"\x89PNG no more")
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("no image")
    return folder


def table(directory: Path) -> dict[str, dict]:
    """Rows of all shards by the place of the image."""
    rows = [row for path in sorted(directory.glob("part-*")) for row in pq.read_table(path).to_pylist()]
    return {row["source_uri"]: row for row in rows}


def test_predictions_of_a_folder_are_those_of_the_mixture_and_broken_images_are_listed(
    root: str, mixture: Mixture, pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = invoke(tmp_path, "predict", str(pictures), "--root", root, "-o", str(out), "-k", "4")
    assert result.returncode == 0, result.stderr
    assert "40 images, and 2 that cannot be decoded" in result.stderr
    assert result.stdout.strip() == str(out / "predictions")
    rows = table(out / "predictions")
    paths = sorted(path for path in pictures.rglob("*.png") if path.name != "broken.png")
    assert len(rows) == len(paths) == 40
    by_uri = [next(row for uri, row in rows.items() if uri.endswith(path.name)) for path in paths]
    for row, expected in zip(by_uri, mixture.predict(paths, k=4), strict=True):
        assert row["expert"] == expected.expert and row["tags"] == expected.tags
        np.testing.assert_allclose(row["probabilities"], expected.probabilities, rtol=1e-5)
    bad = pq.read_table(next((out / "predictions" / "quarantine").iterdir())).to_pylist()
    assert {Path(row["source_uri"]).name for row in bad} == {"broken.png", "empty.jpg"}
    assert json.loads((out / "predictions" / "artifact.json").read_text())["payload"]["quarantined"] == 2


def test_single_images_without_a_directory_become_lines(root: str, mixture: Mixture, pictures: Path) -> None:
    chosen = [str(pictures / "01 [x].png"), str(pictures / "broken.png")]
    result = invoke(pictures, "predict", *chosen, "--root", root, "-k", "2")
    assert result.returncode == 0, result.stderr
    (line,) = [json.loads(line) for line in result.stdout.splitlines()]
    (expected,) = mixture.predict(chosen[:1], k=2)
    assert line["tags"] == expected.tags and line["expert"] == expected.expert
    assert "broken.png: not an image" in result.stderr
    vector = json.loads(invoke(pictures, "embed", chosen[0], "--root", root).stdout)["embedding"]
    np.testing.assert_allclose(vector, mixture.embed(chosen[:1])[0], rtol=1e-5, atol=1e-6)
    assert "the image cannot be decoded" in refusal(invoke(pictures, "predict", chosen[1], "--root", root))


def test_embeddings_as_lines_and_as_parquet_are_the_same_and_those_of_the_mixture(
    root: str, mixture: Mixture, finished: Path, tmp_path: Path
) -> None:
    """A source as the dataset stage reads it: Parquet files named by a recipe."""
    for kind in ("parquet", "jsonl"):
        result = invoke(
            finished, "embed", "--root", root, "--source", "hardmoe.yaml", "-o", str(tmp_path / kind), "--format", kind
        )
        assert result.returncode == 0, result.stderr
    rows = table(tmp_path / "parquet" / "embeddings")
    paths = sorted((tmp_path / "jsonl" / "embeddings").glob("*.jsonl"))
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    assert len(rows) == len(lines) == 500
    for line in lines:
        row = rows[line["source_uri"]]
        assert row["example_id"].hex() == line["example_id"] and row["expert"] == line["expert"]
        assert np.float32(line["embedding"]).tolist() == row["embedding"]
    images = [image for path in sorted((finished / "photos").iterdir()) for image in pq.read_table(path)["image"].to_pylist()]
    np.testing.assert_allclose([row["embedding"] for row in rows.values()], mixture.embed(images), rtol=1e-5, atol=1e-5)


def test_experts_are_loaded_once_for_all_shards_and_interrupted_work_is_resumed(
    root: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos").symlink_to(finished / "photos")
    write_recipe(tmp_path, dataset={"shard_rows": 64})
    arguments = ("predict", "--root", root, "--source", "hardmoe.yaml", "-o", "out")
    work._open.cache_clear()
    answer, calls = work.answer, []

    def interrupted(*given: object, **more: object) -> object:
        calls.append(given)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return answer(*given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(work, "answer", interrupted)
    assert invoke(tmp_path, *arguments).returncode == 130
    assert not (tmp_path / "out" / "predictions" / "artifact.json").exists()
    assert invoke(tmp_path, *arguments).returncode == 0
    num_shards = len(list((tmp_path / "out" / "predictions").glob("part-*")))
    assert num_shards >= 6 and len(calls) == num_shards + 1, "units that were done were done again"
    assert work._open(root, None, False, None).experts.num_loads == 3
    before = (tmp_path / "out" / "predictions" / "artifact.json").read_bytes()
    monkeypatch.setattr(work, "answer", None)
    assert invoke(tmp_path, *arguments).returncode == 0
    refused = refusal(invoke(tmp_path, *arguments, "-k", "3"))
    assert "answers another request (asked.k: 10 -> 3)" in refused and "another --out" in refused
    assert (tmp_path / "out" / "predictions" / "artifact.json").read_bytes() == before


@pytest.mark.long
def test_workers_of_ray_write_the_tables_of_one_process(root: str, finished: Path, tmp_path: Path) -> None:
    records = []
    for name, more in (("inline", ()), ("ray", ("--parallel", "2"))):
        out = tmp_path / name
        result = invoke(finished, "predict", "--root", root, "--source", "hardmoe.yaml", "-o", str(out), *more)
        assert result.returncode == 0, result.stderr
        records.append(table(out / "predictions"))
    inline, on_ray = records
    assert inline.keys() == on_ray.keys()
    for uri, row in inline.items():
        assert row["tags"] == on_ray[uri]["tags"]
        np.testing.assert_allclose(row["probabilities"], on_ray[uri]["probabilities"], rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name images or folders, or a recipe"),
        (("pictures", "--source", "hardmoe.yaml"), "and not both"),
        (("pictures", "--format", "jsonl"), "--format is for tables; name a directory"),
        (("nowhere.png",), "there is no image or folder 'nowhere.png'"),
        (("nothing/*.png",), "nothing/*.png' matches no file"),
        (("",), "an image's place is empty"),
        (("https://example.com/a.png",), "download the image first"),
    ],
)
def test_arguments_that_cannot_work_are_refused(root: str, finished: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in refusal(invoke(finished, "predict", *arguments, "--root", root))
