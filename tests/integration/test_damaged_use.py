"""A finished run in use, of which a file is damaged or was made anew: told, never answered from.

Weights with a bit turned load like any others. They were once answered from, and a server took an expert that was trained again
together with the old decoder.
"""

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from served import request, serving
from support import copied_run, invoke, real_images, refusal

from hardmoe.errors import CorruptFileError, RebuiltInputError
from hardmoe.mixture import Mixture
from hardmoe.searching.search import SearchIndex
from hardmoe.searching.stage import INDEX_FILE
from hardmoe.serving.app import Service
from hardmoe.serving.engine import LocalEngine

EXPERT = "experts/expert-0001/model.safetensors"
FILES = ("trunk/model.safetensors", EXPERT, "decoder/decoder.safetensors", "router/centroids.npy", "router/transform.safetensors")


@pytest.fixture(scope="module")
def damaged(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished run, indexed, whose files each test damages and mends."""
    root = copied_run(finished, tmp_path_factory.mktemp("damaged-use"))
    assert invoke(root, "index", "--root", str(root)).returncode == 0
    return root


@pytest.fixture
def images(damaged: Path, finished: Path) -> list[bytes]:
    return pq.read_table(finished / "photos" / "0.parquet")["image"].to_pylist()


@pytest.fixture
def mending(damaged: Path) -> Iterator[None]:
    """Whatever a test does to these files is undone."""
    names = [*FILES, f"index/{INDEX_FILE}", "experts/expert-0001/artifact.json"]
    kept = {name: (damaged / name).read_bytes() for name in names}
    yield
    for name, data in kept.items():
        (damaged / name).write_bytes(data)


def cut_short(data: bytes) -> bytes:
    return data[:-7]


def turn_a_bit(data: bytes) -> bytes:
    """In the last tensor, where neither format has anything to notice it by."""
    at = len(data) - 3
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


def be_a_pickle(data: bytes) -> bytes:
    return pickle.dumps({"weights": list(data[:100])}).ljust(len(data), b"\0")


@pytest.mark.usefixtures("mending")
@pytest.mark.parametrize("damage", [cut_short, turn_a_bit, be_a_pickle])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_a_mixture_is_named_and_nothing_is_answered(
    damaged: Path, images: list[bytes], name: str, damage: Callable[[bytes], bytes]
) -> None:
    (damaged / name).write_bytes(damage((damaged / name).read_bytes()))
    with pytest.raises(CorruptFileError) as caught:
        Mixture.load(str(damaged)).predict(images)
    assert str(damaged / name) in str(caught.value)
    assert f"delete {(damaged / name).parent} and what stands on it" in str(caught.value)


@pytest.mark.usefixtures("mending")
@pytest.mark.parametrize("damage", [cut_short, turn_a_bit, be_a_pickle])
def test_a_damaged_index_is_named_before_its_reader_sees_it(damaged: Path, damage: Callable[[bytes], bytes]) -> None:
    path = damaged / "index" / INDEX_FILE
    path.write_bytes(damage(path.read_bytes()))
    assert str(path) in refusal(invoke(damaged, "search", "#bold", "--root", str(damaged)))


def train_again(root: Path) -> None:
    """Other weights of an expert, with a record that vouches for them."""
    weights = safetensors.numpy.load((root / EXPERT).read_bytes())
    data = safetensors.numpy.save({name: np.asarray(array * 2) for name, array in weights.items()})
    (root / EXPERT).write_bytes(data)
    record = root / EXPERT.replace("model.safetensors", "artifact.json")
    body = json.loads(record.read_bytes())
    (entry,) = [entry for entry in body["files"] if entry["path"] == "model.safetensors"]
    entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    record.write_text(json.dumps(body))


@pytest.mark.usefixtures("mending")
def test_an_expert_that_was_trained_again_is_no_part_of_a_mixture_that_was_opened_before(
    damaged: Path, images: list[bytes]
) -> None:
    mixture = Mixture.load(str(damaged))
    mixture.warm_up()
    train_again(damaged)
    with pytest.raises(RebuiltInputError, match="expert-0001 was built anew or deleted since the mixture was opened; open it"):
        mixture.predict(images)
    assert len(Mixture.load(str(damaged)).predict(images, k=1)) == len(images)
    with pytest.raises(Exception, match="is of another mixture, or of this one before it was trained again"):
        SearchIndex.open(str(damaged), Mixture.load(str(damaged)))


@pytest.mark.usefixtures("mending")
def test_a_server_whose_root_is_damaged_under_it_says_so_in_its_log_and_goes_on(
    damaged: Path, images: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    mixture = Mixture.load(str(damaged))
    mixture.warm_up()
    good = (damaged / EXPERT).read_bytes()
    (damaged / EXPERT).write_bytes(turn_a_bit(good))
    chosen = images[mixture.route(images).tolist().index(1)]
    with serving(Service(mixture, LocalEngine(mixture), None)) as port:
        status, body = request(port, "POST", "/predict", chosen, Content_Type="image/png")
        assert status == 500 and json.loads(body) == {"error": "the server cannot answer; its log says why"}
        said = capsys.readouterr().err
        assert f"POST /predict: {damaged / EXPERT} has other content" in said and "Traceback" not in said
        assert request(port, "GET", "/health")[0] == 200
        (damaged / EXPERT).write_bytes(good)
        assert request(port, "POST", "/predict", chosen, Content_Type="image/png")[0] == 200


def test_a_mistake_of_the_servers_is_answered_as_the_description_has_it(
    damaged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture = Mixture.load(str(damaged))
    monkeypatch.setattr(mixture, "embed_seen", lambda *given: 1 // 0)
    with serving(Service(mixture, LocalEngine(mixture), None)) as port:
        status, body = request(port, "POST", "/embed", real_images(1)[0].image, Content_Type="image/png")
    assert status == 500 and json.loads(body)["error"]
    assert "ZeroDivisionError" in capsys.readouterr().err
