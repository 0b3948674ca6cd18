"""Records: deterministic bytes, a digest of the result alone, and a clear word about a file that is none."""

import json
from dataclasses import replace

import pytest

from hardmoe.artifacts.record import InputReference, Record, parse_record
from hardmoe.errors import CorruptFileError
from hardmoe.stage import FileEntry

FILES = [FileEntry("b.bin", 3, "b" * 64), FileEntry("a.bin", 1, "a" * 64)]
RECORD = Record("kind", 2, "f" * 64, {"x": 1}, {"data": InputReference("dataset", "1" * 64, "2" * 64)}, FILES, {"n": 5, "ö": "é"})


def test_record_comes_back_from_its_bytes() -> None:
    again = parse_record(RECORD.to_bytes(), "here")
    assert again.digest() == RECORD.digest()
    assert again.to_bytes() == RECORD.to_bytes()
    assert again.inputs == RECORD.inputs
    assert again.payload == RECORD.payload


def test_order_in_which_units_finished_does_not_show() -> None:
    assert replace(RECORD, files=FILES[::-1]).to_bytes() == RECORD.to_bytes()


def test_digest_covers_everything_but_the_place_it_was_taken_from() -> None:
    reused = replace(RECORD, reused_from="/elsewhere/kind")
    assert reused.digest() == RECORD.digest()
    assert parse_record(reused.to_bytes(), "here").reused_from == "/elsewhere/kind"
    others = [
        replace(RECORD, kind="k"),
        replace(RECORD, version=3),
        replace(RECORD, fingerprint="0" * 64),
        replace(RECORD, config={}),
        replace(RECORD, inputs={}),
        replace(RECORD, files=FILES[:1]),
        replace(RECORD, payload={}),
    ]
    assert len({RECORD.digest(), *(other.digest() for other in others)}) == 8


def test_payload_without_a_stable_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"payload\.loss: nan has no stable form"):
        replace(RECORD, payload={"loss": float("nan")}).digest()


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", RECORD.to_bytes()[:200], RECORD.to_bytes().replace(b'"files"', b'"fils"')],
)
def test_file_that_is_no_record_is_named_with_the_remedy(data: bytes) -> None:
    with pytest.raises(CorruptFileError, match=r"^/run/kind/artifact.json is not a record: .*; delete the artifact's directory"):
        parse_record(data, "/run/kind/artifact.json")


def test_record_of_a_later_format_asks_for_its_own_version() -> None:
    body = json.loads(RECORD.to_bytes()) | {"format": 99}
    with pytest.raises(CorruptFileError, match=r"has format 99, this hardmoe reads 1; use the version that wrote it"):
        parse_record(json.dumps(body).encode(), "here")
