"""What a root's URI may say, and what each refusal says: one sentence with the place and the remedy, and never a secret."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from s3 import Store
from support import invoke, refusal

from hardmoe.errors import StorageError
from hardmoe.storage import open_storage, read_if_there
from hardmoe.storage.s3_errors import explained
from hardmoe.storage.s3_uri import parse_s3_uri

OPTIONS = "endpoint=http://127.0.0.1:5000&region=eu-west-1&profile=my%20own"


def test_uri_keeps_the_options_and_people_see_none() -> None:
    place = parse_s3_uri(f"s3://photos/runs/a/?{OPTIONS}")
    assert place.uri() == f"s3://photos/runs/a?{OPTIONS}"
    assert place.uri("b/c") == f"s3://photos/runs/a/b/c?{OPTIONS}"
    assert place.where("b/c") == "s3://photos/runs/a/b/c"
    assert parse_s3_uri(place.uri()) == place
    assert (place.access.endpoint, place.access.region, place.access.profile) == ("http://127.0.0.1:5000", "eu-west-1", "my own")
    assert parse_s3_uri("s3://photos").where("x") == "s3://photos/x"
    assert parse_s3_uri("S3://photos/a?anonymous=1").uri() == "s3://photos/a?anonymous=true"


@pytest.mark.parametrize("name", ["a b", "100%", "what?", "n#1", "a%20b", "x=1&y", "[1]*", "ü"])
def test_any_name_survives_the_way_through_a_uri(name: str) -> None:
    place = parse_s3_uri(f"s3://photos/run?{OPTIONS}")
    assert parse_s3_uri(place.uri(name)).prefix == f"run/{name}"


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("s3://photos/a?endpont=http://x", "s3://photos/a has an unknown option 'endpont'; did you mean 'endpoint'?"),
        (
            "s3://photos/a?secret_access_key=hunter2",
            "s3://photos/a has an unknown option 'secret_access_key'; there are endpoint, region, profile, anonymous",
        ),
        (
            "s3://me:hunter2@photos/a",
            "a URI must hold no credentials, but one for s3://photos does; take them out and set AWS_PROFILE, or "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ),
        (
            "s3://photos/a?endpoint=http://me:hunter2@host",
            "s3://photos/a: the option 'endpoint' must hold no credentials; take them out and set AWS_PROFILE",
        ),
        (
            "s3://photos?endpoint=http://[::1",
            "s3://photos: the option 'endpoint' is 'http://[::1'; write it as endpoint=https://host:port",
        ),
        (
            "s3://photos?endpoint=http://host:99999",
            "s3://photos: the option 'endpoint' is 'http://host:99999'; write it as endpoint=https://host:port",
        ),
        (
            "s3://photos?endpoint=host:9000",
            "s3://photos: the option 'endpoint' is 'host:9000'; write it as endpoint=https://host:port",
        ),
        ("s3://photos?region=", "s3://photos: give the option 'region' once and with a value, or leave it out"),
        ("s3://photos?region=a&region=b", "s3://photos: give the option 'region' once and with a value, or leave it out"),
        ("s3://photos?anonymous=maybe", "s3://photos: the option 'anonymous' is 'maybe'; write anonymous=true, or leave it out"),
        (
            "s3://photos?anonymous=true&profile=a",
            "s3://photos: the options 'anonymous' and 'profile' exclude each other; leave one of them out",
        ),
        ("s3:///run", "cannot use 's3:///run': '' is no bucket name; write s3://bucket/prefix"),
        ("s3://my photos/run", "cannot use 's3://my photos/run': 'my photos' is no bucket name; write s3://bucket/prefix"),
        ("s3://photos/a/../b", "cannot use 's3://photos/a/../b': a prefix must be without '..' and without control characters"),
        ("gs://photos/run", "cannot use the root 'gs://photos/run': gs:// is not supported yet; use s3:// or a local path"),
        (
            "http://me:hunter2@host/run",
            "cannot use the root 'http://host/run': 'http://host' is not supported; give a local path, or s3://",
        ),
    ],
)
def test_uri_that_cannot_be_used_is_refused_in_one_sentence(uri: str, sentence: str) -> None:
    with pytest.raises(StorageError) as caught:
        open_storage(uri)
    assert str(caught.value) == sentence
    assert "hunter2" not in sentence


def test_profile_that_does_not_exist_is_named(s3_store: Store) -> None:
    with pytest.raises(
        StorageError, match=r"cannot open an S3 store: .*\(nobody\).*; correct the URI's options or ~/.aws/config"
    ):
        open_storage("s3://photos/run?profile=nobody")


def test_missing_bucket_is_told_by_reading_listing_and_writing(s3_store: Store) -> None:
    storage = open_storage(f"s3://nothing-here/run?endpoint={s3_store.proxy.url}")
    operations = [
        ("read", lambda: storage.read_bytes("x")),
        ("read", lambda: storage.open_input("x")),
        ("list", lambda: storage.list("x")),
        ("write", lambda: storage.write_bytes("x", b"")),
        ("write", lambda: storage.create("x", b"")),
        ("write", lambda: storage.replace("x", b"", b"")),
    ]
    for verb, operation in operations:
        with pytest.raises(StorageError) as caught:
            operation()
        remedy = "there is no such bucket; create it, or correct its name or the option 'endpoint'"
        assert str(caught.value) == f"cannot {verb} s3://nothing-here/run/x: {remedy}"


def test_machine_without_credentials_is_told_how_to_give_some(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = s3_store.root()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    # A region of its own, because clients are kept per options, with the credentials that they found.
    with pytest.raises(
        StorageError,
        match=r"no usable credentials \(Unable to locate credentials\); set AWS_PROFILE, or AWS_ACCESS_KEY_ID and "
        r"AWS_SECRET_ACCESS_KEY, or add '\?anonymous=true' for a public bucket$",
    ):
        open_storage(f"{uri}&region=none-1").read_bytes("x")
    open_storage(f"{uri}&anonymous=true").write_bytes("x", b"open to all")
    assert s3_store.proxy.requests == {"PUT": 1}
    assert "Authorization" not in s3_store.proxy.headers[0]


def test_region_endpoint_and_profile_come_from_the_environment_unless_given(
    s3_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3_store.bucket()
    (tmp_path / "config").write_text("[profile me]\naws_access_key_id = of-me\naws_secret_access_key = x\nregion = eu-south-2\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_store.proxy.url)
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    for options, environment, expected in (
        ("profile=me", {}, "of-me/eu-south-2"),
        ("profile=me&region=us-west-1", {}, "of-me/us-west-1"),
        ("region=us-west-2", {"AWS_REGION": "ap-south-1"}, "testing/us-west-2"),
        ("", {"AWS_REGION": "ap-south-1"}, "testing/ap-south-1"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("hardmoe.storage.s3_client._clients", {})
            for name, value in environment.items():
                patch.setenv(name, value)
            open_storage(f"s3://{bucket}/run?{options}").write_bytes("x", b"")
        key, _, region = expected.partition("/")
        signed = s3_store.proxy.headers[-1]["Authorization"]
        assert f"Credential={key}/" in signed
        assert f"/{region}/s3/" in signed


def _answer(status: int, code: str, **headers: str) -> ClientError:
    body: Any = {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers}}
    return ClientError(body, "GetObject")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            _answer(403, "AccessDenied"),
            r"access is denied \(AccessDenied\); allow these credentials to read, write and list there",
        ),
        (_answer(403, "403"), r"access is denied \(403\)"),
        (_answer(403, "InvalidAccessKeyId"), r"the credentials are refused \(InvalidAccessKeyId\); renew them, or choose others"),
        (_answer(400, "ExpiredToken"), r"the credentials are refused \(ExpiredToken\); renew them"),
        (
            _answer(301, "PermanentRedirect", **{"x-amz-bucket-region": "eu-west-3"}),
            r"the bucket is in another region, eu-west-3 \(PermanentRedirect\); name it with '\?region='",
        ),
        (
            _answer(400, "AuthorizationHeaderMalformed"),
            r"the bucket is in another region \(AuthorizationHeaderMalformed\); name it with",
        ),
        (_answer(403, "RequestTimeTooSkewed"), r"this machine's clock is too far off; set it"),
        (_answer(501, "NotImplemented"), r"this store lacks conditional writes \(If-None-Match\); use one that has them"),
        (_answer(405, "MethodNotAllowed"), r"answered 405 MethodNotAllowed; check that it is an S3 store and allows the request"),
    ],
)
def test_refusal_of_the_store_is_one_sentence_with_the_remedy(s3_store: Store, error: ClientError, sentence: str) -> None:
    """moto checks neither keys nor regions, so these answers are what AWS documents."""
    client = boto3.client("s3", endpoint_url=s3_store.direct)
    with (
        pytest.raises(StorageError, match=rf"^cannot read s3://b/x: (http://\S+ )?{sentence}"),
        explained("read", "s3://b/x", client),
    ):
        raise error


def test_missing_bucket_is_told_from_a_missing_file(s3_store: Store) -> None:
    """An answer to HEAD is 404 for both: a run in a misspelt bucket was one that had not begun."""
    absent = open_storage(f"s3://no-such-bucket/run?endpoint={s3_store.proxy.url}")
    for look in (absent.exists, absent.size, absent.read_bytes, absent.list, partial(read_if_there, absent)):
        with pytest.raises(StorageError, match=r"^cannot \w+ s3://no-such-bucket/run/x: there is no such bucket; create it, or"):
            look("x")
    there = open_storage(s3_store.root())
    s3_store.proxy.reset()
    assert not there.exists("x") and not there.exists("y")
    assert s3_store.proxy.requests == {"HEAD": 3}, "the bucket is asked for once"


@pytest.mark.parametrize("command", [["status"], ["show", "dataset"], ["verify"], ["logs"]], ids=lambda command: command[0])
def test_looking_at_a_run_in_a_bucket_that_is_not_there_or_closed_says_so(
    s3_store: Store, tmp_path: Path, command: list[str]
) -> None:
    absent = f"s3://no-such-bucket/run?endpoint={s3_store.proxy.url}"
    sentence = refusal(invoke(tmp_path, *command, "--root", absent))
    assert sentence.startswith("cannot read s3://no-such-bucket/run/recipe.yaml: there is no such bucket; create it, or correct")
    s3_store.proxy.next("HEAD", "recipe.yaml", "denied")
    sentence = refusal(invoke(tmp_path, *command, "--root", s3_store.root()))
    assert sentence.startswith("cannot read s3://bucket-") and "/run/recipe.yaml: access is denied (403); allow these" in sentence
    sentence = refusal(invoke(tmp_path, *command, "--root", s3_store.root()))
    assert sentence.startswith("no run was begun in s3://bucket-")


def test_endpoint_where_nobody_listens_is_named(s3_store: Store, unused_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hardmoe.storage.s3_client.PATIENCE_SECONDS", 0.1)
    endpoint = f"http://127.0.0.1:{unused_port}"
    with pytest.raises(StorageError) as caught:
        open_storage(f"s3://bucket/run?endpoint={endpoint}").exists("x")
    sentence = str(caught.value)
    assert sentence.startswith(
        f"cannot read s3://bucket/run/x: {endpoint} does not answer (Could not connect to the endpoint URL"
    )
    assert sentence.endswith("; correct the option 'endpoint' or the network, then run again")


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def test_local_roots_load_no_boto3(tmp_path: Path) -> None:
    code = """
import sys
from hardmoe.storage import open_storage
open_storage(sys.argv[1]).list("")
assert not {"boto3", "botocore"} & set(sys.modules)
open_storage("s3://bucket/run")
assert "boto3" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
