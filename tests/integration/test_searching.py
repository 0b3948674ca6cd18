"""`hardmoe index` and `hardmoe search`, over a run's own images and over a collection that was embedded."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support import copied_run, invoke, payload, refusal

from hardmoe.mixture import Mixture
from hardmoe.searching.search import SearchIndex


@pytest.fixture(scope="module")
def root(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run, indexed."""
    root = copied_run(finished, tmp_path_factory.mktemp("searching"))
    result = invoke(root, "index", "--root", str(root))
    assert result.returncode == 0, result.stderr
    assert "flat: recall@10 100.0 % against exact search" in result.stdout
    return root


@pytest.fixture(scope="module")
def mixture(root: Path) -> Mixture:
    return Mixture.load(str(root))


def images_of(root: Path) -> dict[str, bytes]:
    tables = [pq.read_table(path, partitioning=None) for path in root.glob("partition/split=*/**/*.parquet")]
    return {row["example_id"].hex(): row["image"] for table in tables for row in table.to_pylist()}


def test_every_image_of_the_run_is_found_by_itself_with_its_thumbnail(root: Path, mixture: Mixture) -> None:
    index, images = SearchIndex.open(str(root), mixture), images_of(root)
    assert len(index) == len(images) == payload(root, "index")["rows"]
    names = list(images)[::7]
    found = index.of_vectors(mixture.embed([images[name] for name in names]), 3)
    hits = [name in {each.example_id for each in near if each.cosine > 0.9999} for name, near in zip(names, found, strict=True)]
    assert np.mean(hits) > 0.98, "the experts' features are rounded to float16 in the tables"
    nearest = found[0][0]
    assert nearest.source_uri.endswith(tuple(f"#row={number}" for number in range(500))) or "row" in nearest.source_uri
    thumbnail = index.thumbnail(nearest.row)
    assert thumbnail is not None and Image.open(io.BytesIO(thumbnail)).size == (96, 96)


def test_images_of_a_hashtag_are_those_in_the_direction_of_its_row_of_the_decoder(root: Path, mixture: Mixture) -> None:
    index, images = SearchIndex.open(str(root), mixture), images_of(root)
    vectors = mixture.embed(list(images.values())).astype(float)
    weight = mixture.decoder.decoder.weight.detach().double().numpy()
    for row in (0, 5):
        cosines = vectors @ weight[row] / np.linalg.norm(vectors, axis=1) / np.linalg.norm(weight[row])
        found = index.of_tag(f"#{mixture.tags[row].upper()}", 5)
        np.testing.assert_allclose([each.cosine for each in found], np.sort(cosines)[::-1][:5], atol=2e-3)


def test_search_prints_lines_or_json_and_refuses_an_unknown_hashtag(root: Path, mixture: Mixture, tmp_path: Path) -> None:
    tag = mixture.tags[0]
    told = invoke(tmp_path, "search", f"#{tag}", "--root", str(root), "-n", "3")
    assert told.returncode == 0 and len(told.stdout.splitlines()) == 4
    (tmp_path / "image.png").write_bytes(next(iter(images_of(root).values())))
    found = json.loads(invoke(tmp_path, "search", "image.png", "--root", str(root), "-n", "2", "--json").stdout)
    assert len(found) == 2 and found[0]["cosine"] > 0.999
    assert "has no hashtag" in refusal(invoke(tmp_path, "search", f"#{tag}xx", "--root", str(root)))
    assert tag in refusal(invoke(tmp_path, "search", f"#{tag}xx", "--root", str(root)))
    assert "the query is empty" in refusal(invoke(tmp_path, "search", "", "--root", str(root)))


def test_a_file_name_that_a_terminal_would_act_on_stays_one_line(root: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "pictures", str(tmp_path / "vectors")
    folder.mkdir()
    (folder / "two\nlines \x1b[31m é.png").write_bytes(next(iter(images_of(root).values())))
    (folder / "bro\nken.png").write_bytes(b"no image")
    assert "bro\\nken.png: " in invoke(tmp_path, "predict", "pictures", "--root", str(root)).stderr
    for command in (("embed", "pictures", "-o"), ("index", "--vectors")):
        assert invoke(tmp_path, *command, out, "--root", str(root)).returncode == 0
    told = invoke(tmp_path, "search", str(next(folder.glob("two*"))), "--vectors", out, "--root", str(root)).stdout
    assert told.splitlines()[1].endswith("two\\nlines \\x1b[31m é.png") and len(told.splitlines()) == 2


def test_a_collection_that_was_embedded_is_indexed_beside_its_tables(root: Path, finished: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "vectors")
    unmade = refusal(invoke(tmp_path, "index", "--root", str(root), "--vectors", out))
    assert f"no finished embeddings in {out}; make them with 'hardmoe embed --out {out}'" in unmade
    refused = refusal(invoke(tmp_path, "search", "#a", "--root", str(root), "--vectors", out))
    assert "there is no index in" in refused and "hardmoe index" in refused
    assert invoke(finished, "embed", "--source", "hardmoe.yaml", "--root", str(root), "-o", out).returncode == 0
    result = invoke(tmp_path, "index", "--root", str(root), "--vectors", out, "--kind", "ivf", "--recall", "0.9")
    assert result.returncode == 0, result.stderr
    told = payload(tmp_path / "vectors", "index")
    assert told["kind"] == "ivf" and told["recall@10"] >= 0.9 and told["rows"] == 500
    changed = refusal(invoke(tmp_path, "index", "--root", str(root), "--vectors", out))
    assert "asked.kind" in changed
    image = pq.read_table(finished / "photos" / "1.parquet")["image"][17].as_py()
    (tmp_path / "image.png").write_bytes(image)
    found = json.loads(invoke(tmp_path, "search", "image.png", "--root", str(root), "--vectors", out, "--json").stdout)
    assert found[0]["cosine"] > 0.9999 and "1.parquet" in found[0]["source_uri"]
