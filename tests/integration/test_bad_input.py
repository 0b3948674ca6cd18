"""What a user can get wrong: every mistake is one sentence with the value and the remedy, an exit code, and no traceback.

Most of it is said in this process, with the same `main` that the command runs; a few of each kind as a process of its own.
"""

import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mounts import resize, small_disk
from support import copied_run, hardmoe, invoke, real_images, records, refusal, snapshot, write_photos, write_recipe

from hardmoe.data import ingest

BUILD = ("run", "--backend", "inline")


@pytest.fixture(scope="module")
def empty_project(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A directory with photos, the small recipe and nothing built; mistakes made in it must build nothing."""
    directory = tmp_path_factory.mktemp("mistakes")
    (directory / "photos").symlink_to(photos)
    write_recipe(directory)
    return directory


def nothing_was_built(project: Path) -> bool:
    return not list(project.rglob("artifact.json"))


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("partition.expert=4", "unknown key 'partition.expert'; did you mean 'partition.experts'?"),
        ("min_count=4", "unknown key 'min_count'; did you mean 'hashtags.min_count'?"),
        ("parition.experts=4", "unknown key 'parition'; did you mean 'partition'?"),
        ("trunk.learning_rat=1", "unknown key 'trunk.learning_rat'; did you mean 'trunk.learning_rate'?"),
        ("foo=4", "unknown key 'foo'; the keys here are root, reuse, dataset, hashtags, trunk"),
        ("partition.experts=many", "partition.experts must be a whole number, not 'many'"),
        ("partition.experts=2.5", "partition.experts must be a whole number, not 2.5"),
        ("partition.experts=true", "partition.experts must be a whole number, not true"),
        ("partition.experts=null", "partition.experts must be a whole number, not null"),
        ("partition.experts=[1, 2]", "partition.experts must be a whole number, not [1, 2]"),
        ("partition.experts='3'", "partition.experts must be a whole number, not '3'"),
        ("partition.experts=0", "partition.experts must be at least 1, not 0"),
        ("seed=2020-01-01", "seed must be a whole number, not 2020-01-01"),
        ("trunk.learning_rate=-1e-3", "trunk.learning_rate must be more than 0, not -0.001"),
        ("trunk.momentum=1", "trunk.momentum must be less than 1, not 1"),
        ("trunk.gpus=some", "trunk.gpus must be a number or 'auto', not 'some'"),
        ("trunk.gpus=-1", "trunk.gpus must be at least 0, not -1"),
        ("dataset.max_pixels=1000000000", "dataset.max_pixels must be at most 178956970, not 1000000000"),
        ("dataset.test_fraction=.inf", "dataset.test_fraction must be a finite number, not .inf"),
        ("dataset.path=5", "dataset.path must be text or a list, as in [a, b], not 5"),
        ("dataset.path=[1, b]", "dataset.path must be text, not [1, b]"),
        ("reuse=runs/old", "reuse must be a list, as in [a, b], not 'runs/old'"),
        ("reuse=[5]", "reuse[0] must be text, not 5"),
        ("root=5", "root must be text, not 5"),
        ("root=''", "root must be at least 1 character long, not ''"),
        ("evaluation.dense_baseline=maybe", "evaluation.dense_baseline must be true or false, not 'maybe'"),
        (
            "partition.method=kmean",
            "partition.method must be 'kmeans', 'balanced', 'two_level', 'given' or 'random', not 'kmean'",
        ),
        ("experts=4", "experts must be a section with keys of its own, not 4"),
        ("trunk.image_size=4", "trunk.image_size must be at least 8, not 4"),
        ("trunk={epochs: 0, batch_size: 0, momentum: 2}", "trunk.epochs must be at least 1, not 0 (and 2 more mistakes)"),
        ("dataset.test_fraction=0.95", "dataset: test_fraction 0.95 + validation_fraction 0.1 = 1.05 leaves nothing to train"),
        ("decoder={align: none, dim: 8}", "decoder: dim: 8 needs align: affine"),
        ("experts.backbone=resnet20", "experts.init is 'trunk' but experts.backbone 'resnet20' is not the trunk's 'quicknet_w4'"),
        ("experts={backbone: quicknet_w4, stem: small}", "experts.init is 'trunk' but experts.stem 'small' is not the trunk's"),
    ],
)
def test_mistake_in_a_key_names_it_its_value_and_what_it_must_be(empty_project: Path, setting: str, sentence: str) -> None:
    assert refusal(invoke(empty_project, *BUILD, "--set", setting)).startswith(f"hardmoe.yaml: {sentence}")
    assert nothing_was_built(empty_project)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("partition.experts", "--set 'partition.experts' is not of the form key=value, such as --set partition.experts=16"),
        ("=4", "--set '=4' is not of the form key=value"),
        ("dataset.path.x=4", "--set 'dataset.path.x=4': 'path' is a value, not a section"),
        ("dataset.path=[a", "--set 'dataset.path=[a': the value is not valid YAML at line 1, column 3: expected ',' or ']'"),
    ],
)
def test_mistake_in_an_override_shows_it(empty_project: Path, setting: str, sentence: str) -> None:
    assert refusal(invoke(empty_project, *BUILD, "--set", setting)).startswith(sentence)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("partition: {experts: 4\n", "bad.yaml is not valid YAML at line 2, column 1: expected ',' or '}'"),
        ("partition:\n\texperts: 4\n", "bad.yaml is not valid YAML at line 2, column 1: found character '\\t' that cannot"),
        ("seed: 1\nroot: a\nseed: 2\n", "bad.yaml is not valid YAML at line 3, column 1: the key 'seed' is given twice; keep"),
        ("- a\n- b\n", "bad.yaml must be a mapping of sections such as 'dataset:', not [a, b]"),
        ("just words\n", "bad.yaml must be a mapping of sections such as 'dataset:', not 'just words'"),
        ("7: 8\n", "bad.yaml: unknown key 7; the keys here are root"),
        ("a: !!python/object:os.system x\n", "bad.yaml is not valid YAML at line 1, column 4: could not determine a construct"),
        ("extends: other.yaml\n", "bad.yaml: 'extends' names other.yaml, which does not exist; correct the path or take it out"),
        ("extends: bad.yaml\n", "bad.yaml: 'extends' goes round in a circle"),
        ("extends: [a]\n", "bad.yaml: 'extends' must be the path of one recipe, not [a]"),
        ("\xff\xfe", "the recipe bad.yaml is not text in UTF-8; give a YAML file"),
        ("", "the source 'parquet' needs dataset.path; give a file, a pattern such as photos/*.parquet, or a list"),
    ],
)
def test_recipe_that_is_no_recipe_says_what_and_where(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "bad.yaml").write_bytes(text.encode("latin-1"))
    assert refusal(invoke(tmp_path, *BUILD, "-f", "bad.yaml")).startswith(sentence)


def test_missing_recipe_as_a_process_says_how_to_get_one(tmp_path: Path) -> None:
    assert refusal(hardmoe(tmp_path, "run")) == (
        "there is no recipe hardmoe.yaml; name one with -f FILE, or write one with 'hardmoe init'"
    )
    (tmp_path / "recipes").mkdir()
    assert "Is a directory" in refusal(invoke(tmp_path, "run", "-f", "recipes"))
    assert list(tmp_path.iterdir()) == [tmp_path / "recipes"]


def test_section_whose_keys_are_all_commented_out_has_its_defaults(tmp_path: Path) -> None:
    """`hardmoe init` says: delete what you do not change; the section's name may well be left standing."""
    write_recipe(tmp_path, "base.yaml")
    (tmp_path / "hardmoe.yaml").write_text("extends: base.yaml\ntrunk:\n  # epochs: 3\npartition:\n")
    assert "matches no file" in refusal(invoke(tmp_path, *BUILD))


def test_number_in_scientific_notation_is_a_number(empty_project: Path) -> None:
    """YAML 1.1 reads `1e-4` as text, unlike everybody who writes it."""
    settings = ("--set", "partition.tolerance=1e-4", "--set", "trunk.learning_rate=1E-1")
    assert invoke(empty_project, "run", "--dry-run", *settings).returncode == 0


@pytest.mark.parametrize("command", ["status", "logs", "show features", "verify"])
def test_looking_at_a_run_that_was_never_begun_says_how_to_begin(empty_project: Path, tmp_path: Path, command: str) -> None:
    sentence = refusal(invoke(empty_project, *command.split(), "--root", str(tmp_path / "none")))
    assert sentence == f"no run was begun in {tmp_path}/none; begin one with 'hardmoe run', or name another root with --root"


@pytest.mark.parametrize("command", ["logs", "show", "verify"])
def test_artifact_that_the_run_does_not_have_is_answered_with_those_that_it_has(finished: Path, command: str) -> None:
    sentence = refusal(invoke(finished, command, "expert-0007"))
    assert sentence.startswith("this run has no artifact 'expert-0007'; it has dataset, vocabulary, trunk")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--parallel", "0"), "'--parallel': 0 is not in the range x>=1"),
        (("run", "--parallel", "many"), "'--parallel': 'many' is not a valid integer"),
        (("run", "--backend", "dask"), "'--backend': 'dask' is not one of 'ray', 'inline'"),
        (("run", "--expert", "3"), "No such option '--expert'"),
        (("runn",), "No such command 'runn'"),
        (("show",), "Missing argument 'NAME'"),
    ],
)
def test_wrong_use_exits_with_two_and_points_to_the_help(empty_project: Path, arguments: tuple[str, ...], message: str) -> None:
    result = invoke(empty_project, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Usage: hardmoe" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="module")
def oddities(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A project with files that are not what their names say."""
    directory = tmp_path_factory.mktemp("oddities")
    (directory / "photos").symlink_to(photos)
    write_recipe(directory)
    (directory / "nothing").mkdir()
    (odd := directory / "odd").mkdir()
    (odd / "text.parquet").write_text("this is not the format that you are looking for")
    (odd / "empty.parquet").write_bytes(b"")
    (odd / "half.parquet").write_bytes((photos / "0.parquet").read_bytes()[:2000])
    schema = {"image": pa.array([], pa.binary()), "hashtags": pa.array([], pa.list_(pa.string()))}
    pq.write_table(pa.table(schema), odd / "no-rows.parquet")
    pq.write_table(pa.table({"image": ["a.jpg"], "hashtags": [["a"]]}), odd / "paths.parquet")
    return directory


@pytest.mark.parametrize(
    ("setting", "sentences"),
    [
        ("dataset.path=nothing/*.parquet", ("/nothing/*.parquet' matches no file; correct the path",)),
        ("dataset.path=[photos/0.parquet, photos/7.parquet]", ("/photos/7.parquet' matches no file; correct the path",)),
        ("dataset.path=nothing", ("/nothing' is a folder; give a pattern such as", "/nothing/*.parquet'")),
        ("dataset.path=photos/", ("/photos/' is a folder; give a pattern such as", "/photos/*.parquet'")),
        ("dataset.path=null", ("the source 'parquet' needs dataset.path",)),
        ("dataset.path=gs://bucket/a.parquet", ("gs://", "s3://")),
        ("dataset.path=s3://bucket/a.parquet?zone=eu", ("zone", "s3://bucket/a.parquet")),
        ("dataset.path=odd/text.parquet", ("/odd/text.parquet is not a Parquet file", "correct dataset.path")),
        ("dataset.path=odd/empty.parquet", ("/odd/empty.parquet is not a Parquet file",)),
        ("dataset.path=odd/half.parquet", ("/odd/half.parquet is not a Parquet file",)),
        ("dataset.path=odd/no-rows.parquet", ("have no rows; correct the path",)),
        (
            "dataset.path=odd/paths.parquet",
            ("has 1 rows, none with a usable image (no such file (1); ", "correct dataset.path"),
        ),
        ("dataset.image_column=img", ("no column 'img', only image, hashtags; set dataset.image_column, perhaps to 'image'",)),
        ("dataset.tags_column=words", ("has no column 'words', only image, hashtags; set dataset.tags_column",)),
        ("dataset.tags_column=image", ("column 'image' is binary, not hashtags", "set dataset.tags_column or convert it")),
        ("dataset.id_column=photo", ("has no column 'photo'", "set dataset.id_column")),
        (
            "dataset.source=parkett",
            (
                "dataset.source 'parkett' is not one of folder, huggingface,",
                "yfcc100m; did you mean 'parquet'?",
            ),
        ),
        ("dataset={source: icons, path: photos}", ("/photos has no icon fonts", "correct dataset.path")),
        ("hashtags.aliases=nowhere.csv", ("/nowhere.csv cannot be read (No such file or directory); correct hashtags.aliases",)),
    ],
)
def test_photos_that_are_not_there_or_not_photos_are_refused(
    oddities: Path, tmp_path: Path, setting: str, sentences: tuple[str, ...]
) -> None:
    sentence = refusal(invoke(oddities, *BUILD, "--root", str(tmp_path / "root"), "--set", setting))
    assert all(part in sentence for part in sentences), sentence
    assert nothing_was_built(tmp_path)


@pytest.mark.parametrize(
    ("settings", "sentences"),
    [
        (("hashtags.min_count=400",), ("hashtags.min_count=400", "set hashtags.min_count to", "or less, or add data")),
        (("partition.experts=2000",), ("partition.experts is 2000 but there are only", "training examples; ask for")),
        (
            ("partition.experts=30", "partition.method=two_level"),
            (
                "two_level looks for 480 fine clusters, but there are only 374 training",
                "set partition.fine_clusters to 374 or less",
            ),
        ),
    ],
)
def test_data_that_are_too_few_say_how_many_there_are(
    finished: Path, tmp_path: Path, settings: tuple[str, ...], sentences: tuple[str, ...]
) -> None:
    """Everything that stays the same is taken over, so only the stage that must refuse runs."""
    write_recipe(tmp_path, root="runs/b", reuse=[str(finished / "runs" / "small")])
    (tmp_path / "photos").symlink_to(finished / "photos")
    sentence = refusal(invoke(tmp_path, *BUILD, *(a for setting in settings for a in ("--set", setting))))
    assert all(part in sentence for part in sentences), sentence


@pytest.mark.parametrize(
    ("settings", "sentences"),
    [
        (("trunk.backbone=resnet19",), ("unknown backbone 'resnet19'; did you mean resnet18",)),
        (("trunk.backbone=my_networks:small",), ("cannot load the backbone 'my_networks:small': No module named", "PYTHONPATH")),
        (("trunk.backbone=json:tiny",), ("cannot load the backbone 'json:tiny'", "has no attribute 'tiny'")),
        (("trunk.backbone=json:dumps",), ("the backbone 'json:dumps', called with image_size=16, raised TypeError", "factory")),
        (("trunk.backbone=alexnet",), ("'alexnet' cannot be run on images of 16 pixels", "raise trunk.image_size or choose")),
        (("trunk.backbone=vit_b_16", "trunk.image_size=20"), ("'vit_b_16' cannot be built for images of 20 pixels", "another")),
        (("trunk.backbone=vit_b_32", "trunk.image_size=32", "trunk.stem=small"), ("'vit_b_32'", "use stem: auto")),
        (("experts={backbone: resnet19, init: random}",), ("unknown backbone 'resnet19'",)),
        (("decoder.dim=129",), ("decoder.dim 129 is more than four times the experts' width 32", "set it to at most 128")),
        (("decoder.align=lowrank", "decoder.rank=32"), ("decoder.rank 32 is no less than the rank of a full map", "at most 31")),
    ],
)
def test_network_that_cannot_be_is_refused_before_anything_is_ingested(
    empty_project: Path, tmp_path: Path, settings: tuple[str, ...], sentences: tuple[str, ...]
) -> None:
    """Seen: found out by the first unit that trains, after all images had been read, or after all experts."""
    arguments = [argument for setting in settings for argument in ("--set", setting)]
    for command in (BUILD, ("run", "--dry-run")):
        sentence = refusal(invoke(empty_project, *command, "--root", str(tmp_path / "root"), *arguments))
        assert all(part in sentence for part in sentences), sentence
    assert nothing_was_built(tmp_path)


def test_decoder_that_is_too_wide_for_trained_experts_is_refused_before_it_is_fitted(finished: Path, tmp_path: Path) -> None:
    copied_run(finished, tmp_path, keep=["dataset", "vocabulary", "trunk", "features", "router", "partition", "experts"])
    sentence = refusal(invoke(tmp_path, "fit-decoder", "--backend", "inline", "--set", "decoder.dim=129"))
    assert "decoder.dim 129 is more than four times the experts' width 32" in sentence


def test_expert_that_the_recipe_does_not_have_is_refused_with_the_range(finished: Path) -> None:
    sentence = refusal(invoke(finished, "train-experts", "--only", "expert-9999"))
    assert sentence == "--only expert-9999: the recipe's experts are expert-0000 to expert-0002"


@pytest.mark.parametrize(
    ("root", "sentences"),
    [
        ("photos/0.parquet", ("something else stands in its place", "choose another root")),
        ("hardmoe.yaml/run", ("something else stands in its place",)),
        ("/dev/null", ("cannot write /dev/null/recipe.yaml", "choose another root")),
        ("/proc/run", ("cannot write /proc/run/recipe.yaml: no directory can be made there; choose another root",)),
        ("gs://bucket/run", ("cannot use the root 'gs://bucket/run'", "use s3:// or a local path")),
        ("   ", ("the root is empty; give a directory",)),
    ],
)
def test_root_that_cannot_be_one_is_refused(empty_project: Path, root: str, sentences: tuple[str, ...]) -> None:
    before = snapshot(empty_project)
    sentence = refusal(invoke(empty_project, *BUILD, "--root", root))
    assert all(part in sentence for part in sentences), sentence
    assert snapshot(empty_project) == before


def test_root_on_a_read_only_disk_is_refused_with_the_remedy(empty_project: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path, "1m", "ro"):
        sentence = refusal(hardmoe(empty_project, "run", "--root", str(tmp_path / "run")))
    assert sentence == (
        f"cannot write {tmp_path}/run/recipe.yaml: Read-only file system; "
        "choose a root that is writable (recipe key 'root' or --root)"
    )


@pytest.mark.parametrize("size", ["16k", "400k", "1m"])
def test_disk_that_fills_up_is_told_and_with_more_space_the_run_goes_on(
    empty_project: Path, finished: Path, tmp_path: Path, size: str
) -> None:
    """Full before anything is begun, while the dataset is written, and while the trunk trains."""
    arguments = ("partition", "--backend", "inline", "--root", str(tmp_path / "run"))
    with small_disk(tmp_path, size):
        result = invoke(empty_project, *arguments)
        told = "dataset will store about" if size == "16k" else "the disk is full; free some space and run again"
        assert told in result.stderr
        assert result.returncode in (1, 3)
        refusal(result, result.returncode)
        resize(tmp_path, "64m")
        result = invoke(empty_project, *arguments)
        assert result.returncode == 0, result.stderr
        expected = records(finished / "runs" / "small")
        found = records(tmp_path / "run")
        assert found == {name: expected[name] for name in found}
        assert len(found) == 6


def test_ray_that_does_not_answer_is_refused_at_once(finished: Path, tmp_path: Path) -> None:
    """Ray itself knocks for several minutes before it gives up."""
    copied_run(finished, tmp_path, keep=["dataset", "vocabulary", "trunk", "features"])
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        sentence = refusal(hardmoe(tmp_path, "partition", "--address", f"127.0.0.1:{port}", timeout=60))
    assert sentence.startswith(f"no Ray answers at '127.0.0.1:{port}' (Connection refused); correct execution.address")
    sentence = refusal(hardmoe(tmp_path, "partition", "--address", "head", timeout=60))
    assert sentence.startswith("cannot start or reach Ray at 'head': Invalid address format")


def test_image_file_that_is_damaged_inside_fails_its_unit_and_is_read_again_once_mended(tmp_path: Path, photos: Path) -> None:
    """The footer is whole, so the damage is met by a worker, in the middle of the work: exit code 3, and the rest is kept."""
    (tmp_path / "photos").mkdir()
    for path in photos.iterdir():
        (tmp_path / "photos" / path.name).write_bytes(path.read_bytes())
    write_recipe(tmp_path, hashtags={"min_count": 400})
    whole = (tmp_path / "photos" / "1.parquet").read_bytes()
    (tmp_path / "photos" / "1.parquet").write_bytes(whole[:4] + b"\xff" * 300 + whole[304:])
    sentence = refusal(hardmoe(tmp_path, *BUILD), 3)
    assert "dataset/0000" in sentence and "/photos/1.parquet is damaged at row 0 or soon after" in sentence
    assert "write the file again" in sentence
    assert "(everything else is kept; running again does only what is missing)" in sentence
    assert "1.parquet is damaged" in invoke(tmp_path, "logs", "--failed").stdout
    (tmp_path / "photos" / "1.parquet").write_bytes(whole)
    assert "hashtags.min_count=400" in refusal(invoke(tmp_path, *BUILD)), "the dataset is through, the vocabulary refuses"


def test_photos_deleted_while_they_are_read_fail_their_units_and_nothing_else(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put back, the run goes on where it was; the other files' units are not done again."""
    (tmp_path / "photos").mkdir()
    for path in photos.iterdir():
        (tmp_path / "photos" / path.name).write_bytes(path.read_bytes())
    write_recipe(tmp_path, hashtags={"min_count": 400})
    victim, done = tmp_path / "photos" / "2.parquet", []
    whole, ingest_shard = victim.read_bytes(), ingest._RUN["ingest"]

    def watched(context: ingest.UnitContext, config: ingest.DatasetConfig) -> object:
        victim.unlink(missing_ok=True)
        done.append(context.unit.name)
        return ingest_shard(context, config)

    monkeypatch.setitem(ingest._RUN, "ingest", watched)
    sentence = refusal(invoke(tmp_path, *BUILD), 3)
    assert f"cannot read {victim}: there is no such file; put the file back" in sentence
    assert len(done) == 6
    victim.write_bytes(whole)
    monkeypatch.setitem(ingest._RUN, "ingest", lambda c, config: (done.append(c.unit.name), ingest_shard(c, config))[1])
    assert "hashtags.min_count=400" in refusal(invoke(tmp_path, *BUILD))
    assert len(done) == 8, "two units had failed"


def test_traceback_is_shown_when_it_is_asked_for(empty_project: Path) -> None:
    result = hardmoe(empty_project, *BUILD, "--debug", "--set", "partition.experts=0")
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "partition.experts must be at least 1" in result.stderr


def test_source_without_a_hashtag_names_the_column(tmp_path: Path) -> None:
    images = real_images(20)
    write_photos(tmp_path / "photos", images, num_files=1)
    table = pq.read_table(tmp_path / "photos" / "0.parquet")
    pq.write_table(table.set_column(1, "hashtags", pa.nulls(len(table))), tmp_path / "photos" / "0.parquet")
    write_recipe(tmp_path)
    assert refusal(invoke(tmp_path, *BUILD)) == "none of the 20 images has a hashtag; correct dataset.tags_column"
    assert not (tmp_path / "runs" / "small" / "dataset" / "artifact.json").exists(), "known before anything is copied"
