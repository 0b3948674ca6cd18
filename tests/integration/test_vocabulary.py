"""The words of a run: alias tables and lists from files, what they leave out, and what an edit of them rebuilds."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3 import Store
from support import copied_run, invoke, payload, refusal, run_here, snapshot, write_recipe

from hardmoe.data.hashtags import normalise
from hardmoe.storage import open_storage

VOCABULARY = ("partition", "--backend", "inline")


def rows(path: Path) -> list[dict]:  # type: ignore[type-arg]
    table: list[dict] = pq.read_table(path).to_pylist()  # type: ignore[type-arg]
    return table


def tags_of_training(root: Path) -> dict[bytes, set[str]]:
    """Every training example's normal hashtags, from the dataset itself."""
    examples = [row for path in root.glob("dataset/split=train/*") for row in rows(path)]
    return {row["example_id"]: {normalise(tag) for tag in row["tags"]} - {""} for row in examples}


def counted(root: Path, aliases: dict[str, str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for tags in tags_of_training(root).values():
        for tag in {aliases.get(tag, tag) for tag in tags}:
            counts[tag] = counts.get(tag, 0) + 1
    return counts


@pytest.fixture
def small(finished: Path, tmp_path: Path) -> Path:
    """A directory with the small run's dataset in `runs/small`, and nothing that stands on it."""
    copied_run(finished, tmp_path, keep=["dataset"])
    return tmp_path


def write_words(directory: Path, **files: object) -> None:
    for name, words in files.items():
        (directory / f"{name}.txt").write_text("".join(f"{word}\n" for word in words))  # type: ignore[attr-defined]


def test_vocabulary_of_a_run_says_what_was_dropped_and_why(small: Path) -> None:
    pq.write_table(pa.table({"alias": ["#Thin", "bold"], "tag": ["slender", "Heavy"]}), small / "aliases.parquet")
    write_words(small, deny=["#light", "", "FILL"])
    hashtags = {"min_count": 5, "max_tags": 6, "aliases": "aliases.parquet", "deny": "deny.txt"}
    write_recipe(small, hashtags=hashtags)
    run_here(small, *VOCABULARY[:1])
    root = small / "runs" / "small"
    counts = counted(root, {"thin": "slender", "bold": "heavy"})
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    wanted = [item for item in ranked if item[0] not in ("light", "fill") and item[1] >= 5]
    assert [(row["index"], row["tag"], row["count"]) for row in rows(root / "vocabulary/tags.parquet")] == [
        (index, tag, count) for index, (tag, count) in enumerate(wanted[:6])
    ]
    assert {"slender", "heavy"} <= {tag for tag, _ in wanted[:6]}
    reason = {tag: "fewer than min_count" for tag, count in ranked if count < 5}
    reason |= {tag: "beyond max_tags" for tag, _ in wanted[6:]} | dict.fromkeys(("light", "fill"), "on the deny list")
    dropped = [(tag, count, reason[tag]) for tag, count in ranked if tag in reason]
    assert [tuple(row.values()) for row in rows(root / "vocabulary/dropped.parquet")] == dropped
    facts = payload(root, "vocabulary")
    assert facts["num_tags"] == 6
    assert facts["dropped"] == {
        "on the deny list": 2,
        "not on the allow list": 0,
        "fewer than min_count": sum(count < 5 and tag not in ("light", "fill") for tag, count in ranked),
        "beyond max_tags": len(wanted) - 6,
    }
    labels = {row["example_id"]: row["tags"] for path in root.glob("vocabulary/labels/*") for row in rows(path)}
    names = [tag for tag, _ in wanted[:6]]
    for example, tags in tags_of_training(root).items():
        canonical = {{"thin": "slender", "bold": "heavy"}.get(tag, tag) for tag in tags}
        assert labels[example] == [index for index, name in enumerate(names) if name in canonical]


def test_allow_list_keeps_only_its_tags_and_aliases_of_them(small: Path) -> None:
    (small / "aliases.csv").write_text("alias,tag\nthin,slender\n")
    write_words(small, allow=["THIN", "circle", "no-such-tag"])
    write_recipe(small, hashtags={"min_count": 5, "aliases": "aliases.csv", "allow": "allow.txt"})
    run_here(small, *VOCABULARY[:1])
    root = small / "runs" / "small"
    assert {row["tag"] for row in rows(root / "vocabulary/tags.parquet")} == {"slender", "circle"}
    reasons = {row["reason"] for row in rows(root / "vocabulary/dropped.parquet")}
    assert reasons == {"not on the allow list"}


@pytest.mark.parametrize(
    ("allow", "deny", "message"),
    [
        (["thin"], ["Thin"], "the hashtag 'thin' is in"),
        (["no-such-tag"], [], "hashtags.allow and hashtags.deny drop all"),
        (["thin", "#"], [], "allow.txt line 2: '#' is no hashtag"),
    ],
)
def test_lists_that_cannot_be_followed_are_refused(small: Path, allow: list[str], deny: list[str], message: str) -> None:
    write_words(small, allow=allow, deny=deny)
    write_recipe(small, hashtags={"min_count": 5, "allow": "allow.txt", "deny": "deny.txt"})
    assert message in refusal(invoke(small, *VOCABULARY))


def test_list_that_is_gone_is_missed_only_until_the_vocabulary_is_finished(small: Path) -> None:
    write_recipe(small, hashtags={"min_count": 5, "deny": "deny.txt"})
    assert "deny.txt cannot be read (No such file or directory); correct hashtags.deny" in refusal(invoke(small, *VOCABULARY))
    write_words(small, deny=["thin"])
    run_here(small, *VOCABULARY[:1])
    (small / "deny.txt").unlink()
    assert invoke(small, *VOCABULARY).returncode == 0
    write_words(small, deny=["bold"])
    assert "deny.sha256" in refusal(invoke(small, *VOCABULARY))


def test_aliases_and_lists_in_an_object_store_are_read_like_those_on_disk(small: Path, s3_store: Store) -> None:
    place, _, options = s3_store.root("words").partition("?")
    storage = open_storage(f"{place}?{options}")
    storage.write_bytes("aliases.csv", b"alias,tag\nbold,heavy\n")
    storage.write_bytes("deny.txt", b"thin\n")
    hashtags = {"min_count": 5, "aliases": f"{place}/aliases.csv?{options}", "deny": f"{place}/deny.txt?{options}"}
    write_recipe(small, hashtags=hashtags)
    run_here(small, *VOCABULARY[:1])
    root = small / "runs" / "small"
    assert "heavy" in {row["tag"] for row in rows(root / "vocabulary/tags.parquet")}
    assert {row["tag"]: row["reason"] for row in rows(root / "vocabulary/dropped.parquet")}["thin"] == "on the deny list"


def test_alias_edit_rebuilds_the_vocabulary_and_nothing_before_it(finished: Path, tmp_path: Path) -> None:
    """The trunk learns the hashtags, so it stands on the vocabulary; of what a run has, the dataset is what does not."""
    old = copied_run(finished, tmp_path).rename(tmp_path / "runs" / "old")
    before = snapshot(old)
    (tmp_path / "aliases.csv").write_text("alias,tag\nthin,slender\n")
    write_recipe(tmp_path, root="runs/new", reuse=["runs/old"], hashtags={"min_count": 5, "aliases": "aliases.csv"})
    run_here(tmp_path, *VOCABULARY[:1])
    new = tmp_path / "runs" / "new"
    assert snapshot(old) == before, "not a byte of the old run may change"
    record = json.loads((new / "dataset/artifact.json").read_text())
    assert record.pop("reused_from") == str(old / "dataset")
    assert record == json.loads((old / "dataset/artifact.json").read_text())
    assert list(new.glob("dataset/**/*.parquet")) == [], "no image is written again"
    assert "reused_from" not in json.loads((new / "vocabulary/artifact.json").read_text())
    assert "slender" in {row["tag"] for row in rows(new / "vocabulary/tags.parquet")}
