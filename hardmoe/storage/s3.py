"""A root in an S3 bucket, of AWS or of any server that speaks its protocol with conditional writes.

boto3 does all of it: one chain of credentials, one policy of retries (`s3_client`), readers of Parquet included, through a
seekable file (`s3_io`). `create` and `replace` are conditional requests (If-None-Match, If-Match). When the answer to one
was lost and the repetition is refused, what lies there is compared with what we sent: a repetition that meets its own
first attempt must not read as "somebody else was first". Rejected: pyarrow's own S3 file system beside it, which has
neither conditional writes nor the same credentials; and lock objects, which a killed process leaves behind.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, BinaryIO, cast

from botocore.exceptions import ClientError

from hardmoe.errors import StorageError
from hardmoe.storage.base import Entry
from hardmoe.storage.s3_client import Patience, client_for, patiently
from hardmoe.storage.s3_errors import ANSWERS, code_of, explained, is_missing, status_of
from hardmoe.storage.s3_io import Blob, S3Input
from hardmoe.storage.s3_upload import S3Output, copy_object
from hardmoe.storage.s3_uri import S3Access, parse_s3_uri

_ABANDONED_SECONDS = 3600.0
"""A multipart upload begun so long ago is taken for no write in progress; the longest of ours takes minutes."""
_DELETED_AT_ONCE = 1000
_heeding: set[tuple[S3Access, str]] = set()
"""Buckets that were seen to heed conditions; asked once per process."""
_there: set[tuple[S3Access, str]] = set()
"""Buckets that were seen to be there, likewise."""
logger = logging.getLogger("hardmoe")


class S3Storage:
    """Files below a prefix of a bucket; see `LocalStorage` for the meaning of each method."""

    def __init__(self, uri: str) -> None:
        self._place = parse_s3_uri(uri)
        self.uri = self._place.uri()
        # Without a request: a bucket that is not there is told by the first operation.
        self._client()

    def where(self, path: str = "") -> str:
        """A file's place, or the root's, for people to read: without the options."""
        return self._place.where(path)

    def child_uri(self, path: str) -> str:
        """The URI of a directory below, with the same options."""
        return self._place.uri(path)

    def read_bytes(self, path: str) -> bytes:
        """The whole file. A missing file raises MissingFileError."""
        with self._explained("read", path):
            return self._blob(path).read()[0]

    def open_input(self, path: str) -> BinaryIO:
        """Open for reading at any offset; a file that is replaced while it is open raises StorageError."""
        return cast(BinaryIO, S3Input(self._blob(path)))

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write or replace a file atomically."""
        with self.open_output(path) as out:
            out.write(data)

    @contextlib.contextmanager
    def open_output(self, path: str) -> Iterator[S3Output]:
        """Write a file piece by piece; it appears under its name when the block ends without an exception."""
        with S3Output(self._blob(path)) as out:
            yield out

    def create(self, path: str, data: bytes) -> bool:
        """Write a file unless there is one; False, and nothing written, if there is. Exactly one of many racing callers wins.

        Callers that race with equal bytes may both be told that they won, if an answer was lost on the way.
        """
        blob = self._blob(path)
        with self._explained("write", path):
            created = _create(blob, data)
            if created and (place := (self._place.access, self._place.bucket)) not in _heeding:
                # Some stores ignore a condition that they do not know: two processes would build one artifact.
                if _create(blob, data, lost=False) and _create(blob, data, lost=False):
                    raise StorageError(
                        f"cannot write {blob.where}: this store ignores conditional writes (If-None-Match), without which "
                        "two processes would write over each other; use one that has them, such as AWS S3 or MinIO"
                    )
                _heeding.add(place)
            return created

    def replace(self, path: str, expected: bytes, data: bytes | None) -> bool:
        """Replace a file (delete it if `data` is None) only if it holds exactly `expected`; False if it does not.

        If an answer was lost and another process has replaced our content since, nobody can tell that it ever stood there,
        and this is False: what matters to the holder of a lease is that it is lost now.
        """
        blob = self._blob(path)
        with self._explained("write", path):
            try:
                found, etag = blob.read()
            except ANSWERS as error:
                if is_missing(error):
                    return False
                raise
            return found == expected and _swap(blob, etag, data)

    def exists(self, path: str) -> bool:
        """Whether there is a file (not a directory) of that name."""
        return self._head(path, missing_is_fine=True) is not None

    def size(self, path: str) -> int:
        """Bytes of the file. A missing file raises MissingFileError."""
        found = self._head(path)
        assert found is not None
        return int(found["ContentLength"])

    def entries(self, prefix: str) -> list[Entry]:
        """What `list` names, with sizes and ETags, sorted by path."""
        top = self._key(prefix)
        start = len(top) + 1 if top else 0
        with self._explained("list", prefix):
            found = [
                Entry(item["Key"][start:], int(item["Size"]), tag := item["ETag"].strip('"'), f"etag:{tag}")
                for page in self._pages("list_objects_v2", top)
                for item in page.get("Contents", ())
                # Consoles make an empty object of such a name to show a directory.
                if not item["Key"].endswith("/")
            ]
        return sorted(found, key=lambda entry: entry.path)

    def list(self, prefix: str) -> list[str]:
        """Sorted paths, relative to the prefix, of all files below it; a store shows no unfinished writes."""
        return [entry.path for entry in self.entries(prefix)]

    def move(self, source: str, target: str) -> None:
        """Rename a file, replacing what is there: a copy within the store, then a deletion.

        If the process dies in between, both are there and the next call finishes it.
        """
        origin, to = self._blob(source), self._blob(target)
        if origin.key == to.key:
            return
        with self._explained("move", source):
            copy_object(origin, to)
            patiently(lambda: origin.client.delete_object(**origin.address))

    def delete_tree(self, path: str) -> None:
        """Delete a file or a directory with all below it; nothing happens if there is none."""
        top = self._key(path)
        with self._explained("delete", path):
            keys = [item["Key"] for page in self._pages("list_objects_v2", top) for item in page.get("Contents", ())]
            keys += [top] if path.strip("/") else []
            for start in range(0, len(keys), _DELETED_AT_ONCE):
                self._delete(keys[start : start + _DELETED_AT_ONCE], path)

    def free_bytes(self) -> int | None:
        """None: a bucket has no end that one could ask for."""
        return None

    def sweep(self, prefix: str) -> None:
        """Give up multipart uploads that writers who were killed left below a prefix, an hour or more ago."""
        client = self._client()
        with self._explained("delete", prefix):
            try:
                for page in self._pages("list_multipart_uploads", self._key(prefix)):
                    for upload in page.get("Uploads", ()):
                        if _server_time(page) - upload["Initiated"].timestamp() > _ABANDONED_SECONDS:
                            call = {"Bucket": self._place.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                            _unless_gone(lambda call=call: client.abort_multipart_upload(**call))  # type: ignore[misc]
            except ANSWERS as error:
                if status_of(error) not in (403, 501):
                    raise
                # The right to list uploads is often not given, and a run needs it for nothing else.
                logger.info("%s: unfinished uploads cannot be listed (%s)", self.where(prefix), code_of(error))

    def _client(self) -> Any:
        """Looked up each time: a storage may have been sent to another process, where there is another client."""
        return client_for(self._place.access)

    def _key(self, path: str) -> str:
        """The key of a file or the prefix of a directory, without a slash at its end.

        Raises:
            StorageError: the path would leave the root.
        """
        if path.startswith("/") or ".." in path.split("/"):
            raise StorageError(f"the path '{path}' would leave the root {self.where()}; paths must be relative and without '..'")
        return "/".join(part for part in (self._place.prefix, path.rstrip("/")) if part and part != ".")

    def _blob(self, path: str) -> Blob:
        return Blob(self._client(), self._place.bucket, self._key(path), self.where(path))

    def _explained(self, verb: str, path: str) -> contextlib.AbstractContextManager[None]:
        return explained(verb, self.where(path), self._client())

    def _head(self, path: str, *, missing_is_fine: bool = False) -> Mapping[str, Any] | None:
        blob = self._blob(path)
        with self._explained("read", path):
            try:
                found: Mapping[str, Any] = patiently(lambda: blob.client.head_object(**blob.address))
                return found
            except ANSWERS as error:
                if is_missing(error):
                    self._check_bucket()
                    if missing_is_fine:
                        return None
                raise

    def _check_bucket(self) -> None:
        """Make sure, once, that there is a bucket to miss a file in: an answer to HEAD says 404 of both and no word more."""
        if (place := (self._place.access, self._place.bucket)) in _there:
            return
        try:
            patiently(lambda: self._client().head_bucket(Bucket=self._place.bucket))
        except ANSWERS as error:
            if is_missing(error):
                raise _as_answer({"Code": "NoSuchBucket"}, 404) from error
            # Whoever may not look at the bucket as a whole may still read in it.
            if status_of(error) != 403:
                raise
        _there.add(place)

    def _pages(self, operation: str, top: str) -> Iterator[Mapping[str, Any]]:
        """All pages of a listing of what lies below a directory; `a` does not name `ab/`."""
        request = getattr(self._client(), operation)
        call: dict[str, str] = {"Bucket": self._place.bucket, "Prefix": f"{top}/" if top else ""}
        while True:
            page: Mapping[str, Any] = patiently(lambda: request(**call))
            yield page
            if not page.get("IsTruncated"):
                return
            following = {
                "ContinuationToken": page.get("NextContinuationToken"),
                "KeyMarker": page.get("NextKeyMarker"),
                "UploadIdMarker": page.get("NextUploadIdMarker"),
            }
            call.update({name: value for name, value in following.items() if value})

    def _delete(self, keys: Sequence[str], path: str) -> None:
        """Delete up to a thousand objects; those that the store was too busy for are asked for again."""
        client = self._client()
        patience = Patience()
        while keys:
            batch = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
            try:
                refused = client.delete_objects(Bucket=self._place.bucket, Delete=batch).get("Errors", ())
                keys = [item["Key"] for item in refused if item["Code"] != "NoSuchKey"]
                if keys:
                    raise _as_answer(refused[0])
            except ANSWERS as error:
                patience.wait(error)


def _create(blob: Blob, data: bytes, *, lost: bool = True) -> bool:
    """Write an object unless there is one; `lost` says whether equal content counts as ours after an unclear answer."""
    patience = Patience()
    while True:
        try:
            blob.put(data, IfNoneMatch="*")
            return True
        except ANSWERS as error:
            if status_of(error) == 412:
                return lost and patience.failed > 0 and _content(blob) == data
            patience.wait(error)


def _content(blob: Blob) -> bytes | None:
    """What a file holds; None if there is none."""
    try:
        return blob.read()[0]
    except ANSWERS as error:
        if is_missing(error):
            return None
        raise


def _swap(blob: Blob, etag: str, data: bytes | None) -> bool:
    """Replace or delete the version `etag` of an object; False if it is there no more."""
    patience = Patience()
    while True:
        try:
            if data is None:
                blob.client.delete_object(**blob.address, IfMatch=etag)
            else:
                blob.put(data, IfMatch=etag)
            return True
        except ANSWERS as error:
            if status_of(error) == 412 or is_missing(error):
                # Perhaps an attempt of ours got through, whose answer was lost.
                return patience.failed > 0 and _content(blob) == data
            patience.wait(error)


def _unless_gone(request: Callable[[], Any]) -> None:
    try:
        patiently(request)
    except ANSWERS as error:
        if not is_missing(error) and code_of(error) != "NoSuchUpload":
            raise


def _as_answer(refused: Mapping[str, str], status: int | None = None) -> ClientError:
    """What the store says of one object of many, or of its bucket, as if it had been asked about that alone."""
    code = refused.get("Code", "")
    status = status or (403 if code == "AccessDenied" else 400)
    body: Any = {"Error": {"Code": code, "Message": refused.get("Message", "")}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(body, "request")


def _server_time(page: Mapping[str, Any]) -> float:
    """The store's own clock in seconds since 1970, as its answer tells it: ages do not depend on ours."""
    date = page["ResponseMetadata"]["HTTPHeaders"].get("date")
    return parsedate_to_datetime(date).timestamp() if date else time.time()
