"""What an S3 root makes of lost answers, broken bodies and stores that are busy: the same files, and never half of one."""

import hashlib
import os
import pickle
import random
import re
import socket
import threading
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3 import Fault, Faults, Store

from hardmoe.artifacts.record import Record
from hardmoe.artifacts.store import Artifact
from hardmoe.errors import CorruptFileError, StorageError, StoreAwayError
from hardmoe.stage import FileEntry
from hardmoe.storage import Storage, open_storage, s3_silence, sha256_of
from hardmoe.storage import s3 as s3_module

CONTENT = random.Random(5).randbytes(2_500_000)


@pytest.fixture
def storage(s3_store: Store) -> Storage:
    return open_storage(s3_store.root())


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts and copies in pieces as small as moto takes them; real stores want 5 MiB."""
    monkeypatch.setattr("hardmoe.storage.s3_upload.PART_BYTES", 300_000)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)


def _client(store: Store) -> Any:
    return boto3.client("s3", endpoint_url=store.direct)


@pytest.mark.parametrize("faults", [("lose",), ("busy", "lose"), ("refuse",), ("lose", "refuse", "lose")], ids="-".join)
def test_create_whose_answer_was_lost_is_still_ours(s3_store: Store, storage: Storage, faults: tuple[Fault, ...]) -> None:
    s3_store.proxy.next("PUT", "lease", *faults)
    assert storage.create("lease", b"token 1")
    assert s3_store.proxy.injected.total() == len(faults)
    assert not storage.create("lease", b"token 2")
    assert storage.read_bytes("lease") == b"token 1"


def test_create_after_a_lost_request_finds_who_was_first(s3_store: Store, storage: Storage) -> None:
    """The repetition is refused because of somebody else, not because of our own first attempt."""
    storage.write_bytes("lease", b"theirs")
    s3_store.proxy.next("PUT", "lease", "refuse")
    assert not storage.create("lease", b"ours")
    assert storage.read_bytes("lease") == b"theirs"


def test_equal_bytes_of_another_are_not_ours_unless_an_answer_was_lost(s3_store: Store, storage: Storage) -> None:
    assert storage.create("file", b"same")
    s3_store.proxy.reset()
    assert not storage.create("file", b"same")
    assert s3_store.proxy.requests == {"PUT": 1}, "no look at the content without need"


def test_store_that_ignores_conditions_is_refused_at_the_first_one(s3_store: Store, storage: Storage) -> None:
    """It says yes to everybody who wants the lease."""
    s3_store.proxy.ignores_conditions = True
    for _ in range(2):
        with pytest.raises(StorageError, match=r"^cannot write s3://\S+/lease: this store ignores conditional writes \(If-None"):
            storage.create("lease", b"token")
    s3_store.proxy.reset()
    assert storage.create("other", b"token")
    assert storage.create("another", b"token")
    assert s3_store.proxy.requests == {"PUT": 3}, "asked once"


@pytest.mark.parametrize("fault", ["busy", "refuse", "cut", "lose"])
def test_replace_and_conditional_deletion_survive_each_fault(s3_store: Store, storage: Storage, fault: Fault) -> None:
    storage.write_bytes("lease", b"0")
    s3_store.proxy.next("PUT", "lease", fault)
    s3_store.proxy.next("DELETE", "lease", fault)
    assert storage.replace("lease", b"0", b"1")
    assert storage.replace("lease", b"1", None)
    assert not storage.exists("lease")
    assert not storage.replace("lease", b"1", None)
    assert s3_store.proxy.injected == {fault: 2}


@pytest.mark.parametrize("data", [b"3", None], ids=["replaced", "deleted"])
def test_lease_that_another_took_between_our_look_and_our_write_stays_theirs(
    s3_store: Store, storage: Storage, data: bytes | None
) -> None:
    storage.write_bytes("lease", b"1")
    s3_store.proxy.after_fault = lambda: storage.write_bytes("lease", b"2")
    s3_store.proxy.next("DELETE" if data is None else "PUT", "lease", "refuse")
    assert not storage.replace("lease", b"1", data)
    assert storage.read_bytes("lease") == b"2"


def test_conflict_of_simultaneous_conditional_writes_is_tried_again(s3_store: Store, storage: Storage) -> None:
    """AWS answers 409 ConditionalRequestConflict to some of the writes that race; whoever repeats learns who won."""
    s3_store.proxy.next("PUT", "file", "conflict", "conflict")
    assert storage.create("file", b"1")
    assert s3_store.proxy.injected == {"conflict": 2}


def test_broken_bodies_are_continued_and_not_begun_again(s3_store: Store, storage: Storage) -> None:
    storage.write_bytes("file", CONTENT)
    s3_store.proxy.reset()
    s3_store.proxy.next("GET", "file", "cut", "cut", "cut")
    assert storage.read_bytes("file") == CONTENT
    ranges = [headers.get("Range") for headers in s3_store.proxy.headers]
    assert s3_store.proxy.injected == {"cut": 3}
    assert ranges[0] is None
    starts = [int(str(asked).removeprefix("bytes=").rstrip("-")) for asked in ranges[1:]]
    assert starts == sorted(set(starts)), "every attempt went on where the one before had come to"
    assert starts[0] > 1_000_000


@pytest.mark.parametrize("fault", ["busy", "refuse", "cut", "lose"])
def test_parquet_read_in_pieces_through_each_fault_is_the_same_table(
    s3_store: Store, storage: Storage, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"FIRST_BYTES": 10_000, "READ_AHEAD_BYTES": 50_000, "MOST_AHEAD_BYTES": 100_000}.items():
        monkeypatch.setattr(f"hardmoe.storage.s3_io.{name}", value)
    table = pa.table({"number": range(4000), "image": [CONTENT[at : at + 600] for at in range(4000)]})
    with storage.open_output("t.parquet") as out:
        pq.write_table(table, out, row_group_size=500, compression="none")
    s3_store.proxy.faults = Faults(**{fault: 0.3}, seed=3)
    with storage.open_input("t.parquet") as source:
        file = pq.ParquetFile(source, memory_map=False)
        groups = [file.read_row_group(index) for index in range(file.num_row_groups)]
    assert pa.concat_tables(groups).equals(table)
    assert s3_store.proxy.injected[fault] > 1


def test_file_replaced_while_it_is_read_is_an_error_and_never_a_mixture(s3_store: Store, storage: Storage) -> None:
    storage.write_bytes("file", CONTENT)
    with storage.open_input("file") as source:
        assert source.read(10) == CONTENT[:10]
        storage.write_bytes("file", CONTENT[::-1])
        source.seek(2_000_000)
        with pytest.raises(StorageError, match=r"^cannot read s3://\S+/file: it was replaced meanwhile; run again when nothing"):
            source.read(10)
        storage.delete_tree("file")
        with pytest.raises(StorageError, match=r"^cannot read s3://\S+/file: there is no such file$"):
            source.read(10)


def test_whole_file_replaced_within_a_broken_body_is_read_anew(s3_store: Store, storage: Storage) -> None:
    """A status file, which is written every second, must not fail the reader."""
    storage.write_bytes("file", b"a" * 2_000_000)
    s3_store.proxy.after_fault = lambda: storage.write_bytes("file", b"b" * 1_000_000)
    s3_store.proxy.next("GET", "file", "cut")
    assert storage.read_bytes("file") == b"b" * 1_000_000


def test_small_file_is_opened_and_read_with_one_request(s3_store: Store, storage: Storage) -> None:
    storage.write_bytes("file", CONTENT[:200_000])
    s3_store.proxy.reset()
    with storage.open_input("file") as source:
        assert source.read() == CONTENT[:200_000]
    assert s3_store.proxy.requests == {"GET": 1}


def test_artifact_is_verified_with_one_listing_and_one_request_a_file(s3_store: Store, storage: Storage) -> None:
    """There were two more for each: whether it exists, and how large it is."""
    names = [f"sub/{number}" for number in range(5)]
    for name in names:
        storage.write_bytes(f"features/{name}", name.encode())
    entries = [FileEntry(name, len(name), hashlib.sha256(name.encode()).hexdigest()) for name in names]
    s3_store.proxy.reset()
    assert Artifact("features", Record("kind", 1, "", {}, {}, entries), storage).verify() == 5
    assert s3_store.proxy.requests == {"GET": 6}
    storage.write_bytes("features/sub/3", b"others")
    storage.delete_tree("features/sub/4")
    for entry, sentence in ((entries[3], "has 6 bytes where its record says 5"), (entries[4], "is missing although a record")):
        with pytest.raises(CorruptFileError, match=sentence):
            Artifact("features", Record("kind", 1, "", {}, {}, [entry]), storage).verify()


def test_straight_reading_asks_for_more_and_more_at_once(s3_store: Store, storage: Storage) -> None:
    storage.write_bytes("file", CONTENT)
    s3_store.proxy.reset()
    assert sha256_of(storage, "file", 10_000)
    assert s3_store.proxy.requests["GET"] <= 3


@pytest.mark.usefixtures("small_parts")
def test_large_file_goes_up_in_parts_and_is_there_only_at_the_end(s3_store: Store, storage: Storage) -> None:
    with storage.open_output("big") as out:
        for at in range(0, len(CONTENT), 70_000):
            out.write(CONTENT[at : at + 70_000])
        assert not storage.exists("big")
        assert storage.list("") == []
    assert storage.read_bytes("big") == CONTENT
    assert out.sha256 == sha256_of(storage, "big")
    assert sum("partNumber" in path for _, path in s3_store.proxy.log) == 9
    storage.write_bytes("whole", CONTENT)
    assert storage.read_bytes("whole") == CONTENT


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("fault", ["busy", "refuse", "cut", "lose"])
@pytest.mark.parametrize("step", ["uploads", "partNumber", "uploadId"])
def test_multipart_upload_survives_each_fault_at_each_step(s3_store: Store, storage: Storage, fault: Fault, step: str) -> None:
    """The worst is the last one: the store completed the upload and knows it no more when it is asked again."""
    s3_store.proxy.next("PUT" if step == "partNumber" else "POST", step, fault)
    storage.write_bytes("big", CONTENT[:700_000])
    assert s3_store.proxy.injected == {fault: 1}
    assert storage.read_bytes("big") == CONTENT[:700_000]


@pytest.mark.usefixtures("small_parts")
def test_completed_upload_that_the_store_has_forgotten_is_known_by_its_token(s3_store: Store, storage: Storage) -> None:
    """Unlike moto, a store forgets an upload with its completion: all that the repetition hears is NoSuchUpload."""
    s3_store.proxy.next("POST", "uploadId", "lose", "forgotten")
    storage.write_bytes("big", CONTENT)
    assert s3_store.proxy.injected == {"lose": 1, "forgotten": 1}
    assert storage.read_bytes("big") == CONTENT


@pytest.mark.usefixtures("small_parts")
def test_upload_that_another_aborted_is_an_error_although_the_name_exists(s3_store: Store, storage: Storage) -> None:
    storage.write_bytes("big", CONTENT[::-1])
    s3_store.proxy.next("POST", "uploadId", "refuse", "forgotten")
    with pytest.raises(StorageError, match=r"answered 404 NoSuchUpload"):
        storage.write_bytes("big", CONTENT)
    assert storage.read_bytes("big") == CONTENT[::-1]


@pytest.mark.usefixtures("small_parts")
def test_failing_writer_takes_its_parts_back(s3_store: Store, storage: Storage) -> None:
    with pytest.raises(KeyboardInterrupt), storage.open_output("run/big") as out:
        out.write(CONTENT)
        raise KeyboardInterrupt
    assert "Uploads" not in _client(s3_store).list_multipart_uploads(Bucket=storage.where().split("/")[2])
    assert storage.list("") == []


def test_sweep_gives_up_old_uploads_of_this_prefix_only(
    s3_store: Store, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """moto says of every upload that it began in 2010."""
    client, bucket = _client(s3_store), storage.where().split("/")[2]
    for key in ("run/dataset/a", "run/dataset/b", "run/dataset2/c"):
        client.create_multipart_upload(Bucket=bucket, Key=key)
    with monkeypatch.context() as patch:
        patch.setattr(s3_module, "_ABANDONED_SECONDS", 3600 * 24 * 365 * 100.0)
        storage.sweep("dataset")
    assert len(client.list_multipart_uploads(Bucket=bucket)["Uploads"]) == 3, "they might be writes in progress"
    s3_store.proxy.next("DELETE", "run/dataset/a", "lose")
    storage.sweep("dataset")
    assert [upload["Key"] for upload in client.list_multipart_uploads(Bucket=bucket)["Uploads"]] == ["run/dataset2/c"]


def test_parts_grow_so_that_the_allowed_number_holds_five_terabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    from hardmoe.storage.s3_upload import Upload

    upload = object.__new__(Upload)
    upload._parts = []
    total = 0
    for number in range(10_000):
        total += upload.next_part_bytes
        upload._parts.append({"PartNumber": number + 1})
        if number == 999:
            assert total == 1000 * (8 << 20), "a file of up to 8 GiB is made of parts of 8 MiB"
    assert total >= 5 << 40
    assert upload.next_part_bytes <= 5 << 30 << 1


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("fault", ["busy", "refuse", "lose"])
def test_large_move_copies_in_parts_within_the_store(
    s3_store: Store, storage: Storage, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr("hardmoe.storage.s3_upload.COPY_BYTES", 1_000_000)
    monkeypatch.setattr("hardmoe.storage.s3_upload.COPY_PART_BYTES", 800_000)
    storage.write_bytes("staged/big", CONTENT)
    s3_store.proxy.reset()
    s3_store.proxy.next("PUT", "partNumber=2", fault)
    s3_store.proxy.next("POST", "uploadId", fault)
    s3_store.proxy.next("DELETE", "staged/big", fault)
    storage.move("staged/big", "final/big")
    assert storage.list("") == ["final/big"]
    assert storage.read_bytes("final/big") == CONTENT
    assert s3_store.proxy.injected == {fault: 3}
    assert s3_store.proxy.requests["PUT"] == 5, "four parts, one of them twice; no content through this machine"


@pytest.mark.parametrize("fault", ["busy", "refuse", "lose"])
def test_move_survives_each_fault_at_each_step_and_may_be_repeated(s3_store: Store, storage: Storage, fault: Fault) -> None:
    storage.write_bytes("a", b"1")
    s3_store.proxy.next("PUT", "b", fault)
    s3_store.proxy.next("DELETE", "a", fault)
    storage.move("a", "b")
    assert storage.list("") == ["b"]
    # A process that died between copy and deletion.
    storage.write_bytes("a", b"1")
    storage.move("a", "b")
    assert storage.list("") == ["b"]


def test_listing_and_deletion_of_many_files_take_pages(
    s3_store: Store, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than one page of a listing (moto's are as long as we let them be) and more than one batch of a deletion."""
    client, bucket = _client(s3_store), storage.where().split("/")[2]
    names = [f"{number:03}" for number in range(25)]
    for name in [*names, "folder/"]:
        client.put_object(Bucket=bucket, Key=f"run/many/{name}", Body=b"x")
    client.put_object(Bucket=bucket, Key="run/many2", Body=b"x")
    monkeypatch.setattr("moto.settings.get_s3_default_max_keys", lambda: 10)
    monkeypatch.setattr(s3_module, "_DELETED_AT_ONCE", 10)
    s3_store.proxy.faults = Faults(busy=0.2, refuse=0.1, cut=0.1, lose=0.1, seed=2)
    assert storage.list("many") == names
    assert sum("list-type" in path for _, path in s3_store.proxy.log) >= 3
    storage.delete_tree("many")
    assert storage.list("") == ["many2"]
    assert s3_store.proxy.injected.total() > 0
    keys = [item["Key"] for item in client.list_objects_v2(Bucket=bucket)["Contents"]]
    assert keys == ["run/many2"], "the folder's placeholder goes as well"


def test_outage_within_the_patience_is_survived_however_often_it_refuses(
    s3_store: Store, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that answered 503 for 30 s ended runs: ten attempts were over after 23 s on average."""
    monkeypatch.setattr("hardmoe.storage.s3_client.LONGEST_WAIT_SECONDS", 0.01)
    for method in ("PUT", "GET"):
        s3_store.proxy.next(method, "file", *["busy"] * 30)
    storage.write_bytes("file", b"x")
    assert storage.read_bytes("file") == b"x"
    assert s3_store.proxy.injected == {"busy": 60}


def test_busy_store_is_given_up_after_a_bounded_time(s3_store: Store, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience is 60 s in earnest."""
    monkeypatch.setattr("hardmoe.storage.s3_client.PATIENCE_SECONDS", 0.3)
    s3_store.proxy.faults = Faults(busy=1.0)
    with pytest.raises(
        StoreAwayError,
        match=r"^cannot write s3://\S+/run/file: http://\S+ keeps answering 503 SlowDown; run again later or with less in "
        r"parallel, finished work is kept$",
    ):
        storage.write_bytes("file", b"x")
    assert s3_store.proxy.requests["PUT"] > 2


def test_silent_endpoint_is_given_up_after_a_bounded_time(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections and never answers. Patience is 60 s in earnest; here it is over after the first silence."""
    monkeypatch.setattr("hardmoe.storage.s3_client.READ_SECONDS", 0.2)
    monkeypatch.setattr("hardmoe.storage.s3_client.PATIENCE_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        storage = open_storage(f"s3://bucket/run?endpoint={endpoint}")
        with pytest.raises(StorageError, match=rf"^cannot read s3://bucket/run/x: {endpoint} does not answer \(Read timeout"):
            storage.read_bytes("x")


def test_silent_endpoint_is_told_once_while_it_is_still_waited_for(
    s3_store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A terminal that said nothing for 66 s was taken for a hang."""
    monkeypatch.setattr("hardmoe.storage.s3_client.READ_SECONDS", 2.0)
    monkeypatch.setattr("hardmoe.storage.s3_client.PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr("hardmoe.storage.s3_silence.SILENT_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        storage = open_storage(f"s3://bucket/run?endpoint={endpoint}")
        for name in ("x", "y"):
            with pytest.raises(StorageError, match="does not answer"):
                storage.read_bytes(name)
    told = capsys.readouterr().err
    assert re.fullmatch(r"http.*; hardmoe goes on trying until about \d\d:\d\d:\d\d\n", told)
    assert told.startswith(f"{endpoint} does not answer yet (to read s3://bucket/run/x); ")


def test_nothing_is_said_of_a_store_that_answers_and_nobody_watches_when_nothing_is_asked(
    s3_store: Store, storage: Storage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hardmoe.storage.s3_silence.SILENT_SECONDS", 10.0)
    storage.write_bytes("file", CONTENT)
    assert storage.read_bytes("file") == CONTENT
    assert s3_silence._waiting == {}
    assert capsys.readouterr().err == ""


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_threads_share_one_client_and_processes_do_not(s3_store: Store, storage: Storage, tmp_path: Path) -> None:
    """A forked child that used its parent's sockets would read the parent's answers."""
    storage.write_bytes("file", CONTENT)
    again = pickle.loads(pickle.dumps(storage))
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(again._client())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {id(client) for client in found} == {id(storage._client())}  # type: ignore[attr-defined]
    if (child := os.fork()) == 0:
        good = storage._client() is not found[0] and storage.read_bytes("file") == CONTENT  # type: ignore[attr-defined]
        os._exit(0 if good else 1)
    assert storage.read_bytes("file") == CONTENT
    assert os.waitpid(child, 0)[1] == 0
