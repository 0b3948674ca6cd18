"""`hardmoe partition --sweep`: the numbers against scikit-learn, what is built and what is not, and every refusal."""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import adjusted_rand_score, mutual_info_score
from support import copied_run, invoke, records, refusal, snapshot, write_recipe

from hardmoe.arrays import load_arrays
from hardmoe.hashing import derive_seed, hash_fractions
from hardmoe.partitioning import sweep as sweep_module
from hardmoe.partitioning.in_memory import FitOptions, fit
from hardmoe.storage import open_storage

KEPT = ("dataset", "vocabulary", "trunk", "features")
"""What a sweep stands on."""
COUNTS = (2, 3, 6)
SWEEP = ("partition", "--sweep", "6,2,3,2", "--backend", "inline")


@pytest.fixture(scope="module")
def swept(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in whose run features were computed and a sweep was made, and nothing else. Tests must not change it."""
    directory = tmp_path_factory.mktemp("swept")
    copied_run(finished, directory, keep=KEPT)
    result = invoke(directory, *SWEEP)
    assert result.returncode == 0, result.stderr
    return directory


@pytest.fixture(scope="module")
def told(swept: Path) -> dict[str, Any]:
    """The sweep as JSON."""
    body: dict[str, Any] = json.loads(invoke(swept, *SWEEP, "--json").stdout)
    return body


@pytest.fixture
def copy(swept: Path, tmp_path: Path) -> Path:
    """A copy of `swept` that a test may change."""
    copied_run(swept, tmp_path)
    return tmp_path


def root_of(directory: Path) -> Path:
    return directory / "runs" / "small"


def fitted(root: Path, number: int) -> list[Path]:
    return sorted(root.glob(f"sweep/k-{number:04d}-*/artifact.json"))


def training(root: Path) -> tuple[np.ndarray, np.ndarray, list[list[int]]]:
    """Ids, unit features and tags of the training examples, read without hardmoe."""
    features, tags = (
        {
            row["example_id"]: row[column]
            for path in root.glob(pattern)
            for row in pq.read_table(path, partitioning=None).to_pylist()
        }
        for pattern, column in (("features/split=train/*.parquet", "feature"), ("vocabulary/labels/*.parquet", "tags"))
    )
    ids = sorted(features)
    vectors = np.array([features[i] for i in ids], np.float64)
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return np.frombuffer(b"".join(ids), np.uint8).reshape(-1, 16), unit, [tags[i] for i in ids]


def test_every_measure_equals_what_scikit_learn_and_numpy_say(swept: Path, told: dict[str, Any]) -> None:
    ids, unit, tags = training(root_of(swept))
    variance = np.square(unit - unit.mean(axis=0, dtype=np.float64)).sum(axis=1).mean()
    assert told["sample"]["variance"] == pytest.approx(variance, rel=1e-6)
    assert (told["sample"]["rows"], told["sample"]["of"], told["seeds"]) == (len(ids), len(ids), 3)
    occurrences = np.array([tag for row in tags for tag in row])
    repeats = [len(row) for row in tags]
    for row, number in zip(told["sweep"], COUNTS, strict=True):
        parts = []
        for index, seed in enumerate([0, derive_seed(0, "sweep", 1), derive_seed(0, "sweep", 2)]):
            centroids = fit(unit, ids, number, seed, FitOptions(max_passes=5)).centroids_KD.astype(np.float64)
            squared = np.square(unit[:, None] - centroids[None]).sum(axis=2)
            parts.append(squared.argmin(axis=1))
            sizes = np.bincount(parts[-1], minlength=number)
            assert row["objective"]["values"][index] == pytest.approx(squared.min(axis=1).mean(), rel=1e-6)
            assert row["variance_share"]["values"][index] == pytest.approx(squared.min(axis=1).mean() / variance, rel=1e-6)
            assert row["largest"]["values"][index] == pytest.approx(sizes.max() / sizes.mean())
            assert row["variation"]["values"][index] == pytest.approx(sizes.std() / sizes.mean())
            bits = mutual_info_score(occurrences, np.repeat(parts[-1], repeats)) / math.log(2)
            net = row["tag_bits"]["values"][index]
            assert net + row["tag_chance_bits"]["values"][index] == pytest.approx(bits, abs=1e-9)
            entropy = mutual_info_score(occurrences, occurrences) / math.log(2)
            assert row["tag_share"]["values"][index] == pytest.approx(net / entropy)
        assert row["sizes"] == np.bincount(parts[0], minlength=number).tolist()
        expected = [adjusted_rand_score(one, other) for one, other in itertools.combinations(parts, 2)]
        np.testing.assert_allclose(row["agreement"]["values"], expected, atol=1e-12)
        assert (row["agreement"]["low"], row["agreement"]["high"]) == pytest.approx((min(expected), max(expected)))


def test_hashtags_of_a_part_are_those_it_has_more_of_than_its_share(swept: Path, told: dict[str, Any]) -> None:
    names = pq.read_table(root_of(swept) / "vocabulary" / "tags.parquet").column("tag").to_pylist()
    ids, unit, tags = training(root_of(swept))
    centroids = fit(unit, ids, 3, 0, FitOptions(max_passes=5)).centroids_KD.astype(np.float64)
    part = np.square(unit[:, None] - centroids[None]).sum(axis=2).argmin(axis=1)
    joint = np.zeros((len(names), 3))
    for row, k in zip(tags, part, strict=True):
        joint[row, k] += 1
    joint /= joint.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        contribution = np.nan_to_num(joint * np.log2(joint / (joint.sum(axis=1, keepdims=True) * joint.sum(axis=0))))
    for k in range(3):
        expected = sorted(contribution[:, k], reverse=True)[:4]
        found = [contribution[names.index(tag), k] for tag in told["sweep"][1]["tags"][k]]
        np.testing.assert_allclose(found, expected)


def test_sweep_prints_a_table_for_people_and_writes_a_page_but_no_router(swept: Path) -> None:
    out = invoke(swept, *SWEEP).stdout
    table = [line.split() for line in out.splitlines()]
    assert [line[0] for line in table if line and line[0].isdigit()][1:] == ["2", "3", "6"]
    for word in ("objective", "agreement", "tag bits", "largest/mean"):
        assert out.count(word) >= 2, f"{word} is a column and in the legend"
    page = root_of(swept) / "sweep" / "index.html"
    assert out.rstrip().endswith(str(page))
    assert "How many parts?" in page.read_text()
    assert not (root_of(swept) / "router").exists()
    assert not (root_of(swept) / "partition").exists()


def test_same_sweep_again_changes_no_file_and_prints_the_same(swept: Path) -> None:
    first, before = invoke(swept, *SWEEP).stdout, snapshot(swept)
    again = invoke(swept, *SWEEP)
    assert (again.stdout, again.returncode) == (first, 0)
    assert snapshot(swept) == before


def test_another_list_fits_only_the_numbers_that_are_new(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, fits = records(root_of(copy)), []
    monkeypatch.setattr(sweep_module, "fit", lambda *arguments: fits.append(arguments[2]) or fit(*arguments))
    assert invoke(copy, "partition", "--sweep", "3,4,6", "--backend", "inline").returncode == 0
    assert fits == [4, 4, 4]
    after = records(root_of(copy))
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 1


def test_other_settings_lie_beside_the_first_ones_and_are_not_refused(copy: Path) -> None:
    before = records(root_of(copy))
    other = (*SWEEP, "--set", "partition.transform=none", "--json")
    plain = json.loads(invoke(copy, *other).stdout)
    five = json.loads(invoke(copy, *SWEEP, "--seeds", "5", "--json").stdout)
    assert plain["sample"]["variance"] != five["sample"]["variance"]
    assert [len(row["agreement"]["values"]) for row in five["sweep"]] == [10, 10, 10]
    assert len(fitted(root_of(copy), 3)) == 3
    after = records(root_of(copy))
    assert {path: after[path] for path in before} == before
    # Neither the number of experts nor the random control has to do with a sweep.
    assert invoke(copy, *SWEEP, "--set", "partition.experts=9").returncode == 0
    assert len(records(root_of(copy))) == len(after)


def test_one_seed_has_no_agreement_and_one_part_is_the_whole_variance(copy: Path) -> None:
    single = ("partition", "--sweep", "1", "--seeds", "1", "--backend", "inline")
    (row,) = json.loads(invoke(copy, *single, "--json").stdout)["sweep"]
    assert row["agreement"] is None
    assert row["variance_share"]["mean"] == pytest.approx(1.0)
    assert row["tag_bits"]["mean"] == 0.0
    assert " - " in invoke(copy, *single).stdout


def test_sample_is_the_router_s_in_the_order_of_the_ids(copy: Path) -> None:
    small = ("--set", "partition.sample_size=150", "--json")
    told = json.loads(invoke(copy, *SWEEP, *small).stdout)
    ids, _, tags = training(root_of(copy))
    chosen = hash_fractions(ids, 0, "router-sample") < 150 / len(ids)
    assert told["sample"]["rows"] == chosen.sum() < len(ids) == told["sample"]["of"]
    sizes = [path.stat().st_size for path in root_of(copy).glob("sweep/sample-*/sample.safetensors")]
    smallest = min(root_of(copy).glob("sweep/sample-*/sample.safetensors"), key=lambda path: path.stat().st_size)
    assert len(sizes) == 2
    sample = load_arrays(open_storage(str(smallest.parent)), smallest.name)
    assert np.array_equal(sample["ids"], ids[chosen])
    expected = [row for row, mine in zip(tags, chosen, strict=True) if mine]
    assert sample["tags"].tolist() == [tag for row in expected for tag in row]
    assert np.diff(sample["offsets"]).tolist() == [len(row) for row in expected]


def test_another_sharding_gives_the_same_sample_and_the_same_numbers(
    swept: Path, told: dict[str, Any], resharded_root: Path, tmp_path: Path
) -> None:
    copied_run(resharded_root.parent.parent, tmp_path, keep=KEPT)
    assert json.loads(invoke(tmp_path, *SWEEP, "--json").stdout)["sweep"] == told["sweep"]
    one, other = (next(root_of(d).glob("sweep/sample-*/sample.safetensors")) for d in (swept, tmp_path))
    assert one.read_bytes() == other.read_bytes()


def test_ray_and_inline_make_the_same_records(swept: Path, finished: Path, tmp_path: Path) -> None:
    copied_run(finished, tmp_path, keep=KEPT)
    result = invoke(tmp_path, "partition", "--sweep", "2,3,6", "--backend", "ray", "--parallel", "2")
    assert result.returncode == 0, result.stderr
    assert records(root_of(tmp_path)) == records(root_of(swept))


def test_failed_fit_leaves_the_others_and_is_alone_done_again(
    finished: Path, swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied_run(finished, tmp_path, keep=KEPT)
    fits: list[tuple[int, int]] = []

    def breaking(*arguments: Any) -> Any:
        fits.append((arguments[2], arguments[3]))
        if fits[-1] == (3, 0):
            raise MemoryError("no room")
        return fit(*arguments)

    monkeypatch.setattr(sweep_module, "fit", breaking)
    failed = invoke(tmp_path, *SWEEP)
    assert failed.returncode == 3
    assert "no room" in failed.stderr and failed.stdout == ""
    assert len(set(fits)) == 9
    fits.clear()
    monkeypatch.setattr(sweep_module, "fit", lambda *arguments: fits.append((arguments[2], arguments[3])) or fit(*arguments))
    assert invoke(tmp_path, *SWEEP).returncode == 0
    assert fits == [(3, 0)]
    assert records(root_of(tmp_path)) == records(root_of(swept))


def test_status_show_logs_and_verify_know_a_sweep(swept: Path) -> None:
    name = fitted(root_of(swept), 3)[0].parent.name
    rows = json.loads(invoke(swept, "status", "--json").stdout)
    assert {row["artifact"]: row["state"] for row in rows}[f"sweep/{name}"] == "done"
    assert '"agreement"' in invoke(swept, "show", name).stdout
    assert invoke(swept, "logs", name).returncode == 0
    assert f"sweep/{name}: ok" in invoke(swept, "verify").stdout


def test_sweep_is_taken_over_from_another_root(copy: Path) -> None:
    write_recipe(copy, "new.yaml", root="runs/new", reuse=["runs/small"], partition={"experts": 2})
    assert invoke(copy, *SWEEP, "-f", "new.yaml").returncode == 0
    reused = [path for path, body in records(copy / "runs" / "new").items() if b"reused_from" in body]
    assert len([path for path in reused if path.startswith("sweep/")]) == 1 + len(COUNTS)


def test_fits_that_ran_out_of_passes_are_named(copy: Path) -> None:
    out = invoke(copy, *SWEEP, "--set", "partition.max_passes=1").stdout
    assert "stopped at partition.max_passes=1 before they converged: 3 of 3 with 2 parts" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ("--set", "partition.method=two_level"),
            "--sweep compares numbers of parts for k-means, but partition.method is two_level",
        ),
        (("--set", "partition.method=random"), "--sweep compares numbers of parts for k-means, but partition.method is random"),
        (("--sweep", "300000"), "--sweep asks for 300000 parts of a sample of 262144 examples; ask for fewer parts"),
    ],
)
def test_sweep_that_makes_no_sense_is_refused_before_anything_is_built(
    project: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    assert refusal(invoke(project, *SWEEP, *arguments)).startswith(sentence)
    assert not (project / "runs").exists()


def test_more_parts_than_examples_are_refused_with_and_without_a_finished_sample(finished: Path, copy: Path) -> None:
    ids, _, _ = training(root_of(copy))
    many = f"2,{len(ids)},{len(ids) + 1}"
    expected = f"--sweep asks for {len(ids) + 1} parts, but the sample holds {len(ids)} of the {len(ids)} training examples"
    before = snapshot(copy)
    assert refusal(invoke(copy, "partition", "--sweep", many, "--backend", "inline")).startswith(expected)
    assert snapshot(copy) == before
    shutil.rmtree(root_of(copy) / "sweep")
    assert refusal(invoke(copy, "partition", "--sweep", many, "--backend", "inline")).startswith(expected)
    assert not fitted(root_of(copy), 2)


def test_taken_over_sample_refuses_too_many_parts_as_well(copy: Path) -> None:
    """The sample's own code, which looks at the numbers asked for, does not run then."""
    write_recipe(copy, "new.yaml", root="runs/new", reuse=["runs/small"])
    sentence = refusal(invoke(copy, "partition", "--sweep", "400", "--backend", "inline", "-f", "new.yaml"))
    assert sentence.startswith("--sweep asks for 400 parts, but the sample holds")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--sweep", "4,x"), "'4,x' is not a list of numbers of parts; write it like 4,8,16"),
        (("--sweep", "0,4"), "'0,4' is not a list of numbers of parts"),
        (("--sweep", ""), "'' is not a list of numbers of parts"),
        (("--sweep", "4", "--check", "other.yaml"), "--sweep and --check are two commands; give one of them"),
        (("--seeds", "4"), "--seeds goes with --sweep"),
        (("--json",), "--json goes with --sweep or --check"),
    ],
)
def test_command_line_that_makes_no_sense_is_a_usage_error(project: Path, arguments: tuple[str, ...], said: str) -> None:
    result = invoke(project, "partition", *arguments)
    assert result.returncode == 2
    assert said in result.stderr
