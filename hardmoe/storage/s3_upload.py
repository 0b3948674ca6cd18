"""Writing objects piece by piece, and copying large ones within a store.

A small file is one request; a larger one is a multipart upload, whose parts a store keeps out of sight until the last
request. The upload carries a random token, so that "no such upload" after a lost answer can be told from an upload that
another process aborted. Parts are sent one after the other: units write in parallel as it is, and each holds one part in
memory. Rejected: boto3's transfer manager, which wants the whole file first and starts threads of its own.
"""

import contextlib
import secrets
from types import TracebackType
from typing import Any

from hardmoe.storage.base import HashingWriter
from hardmoe.storage.s3_client import Patience, patiently
from hardmoe.storage.s3_errors import ANSWERS, code_of, explained
from hardmoe.storage.s3_io import Blob

PART_BYTES = 8 << 20
"""The smallest part (stores want at least 5 MiB); what is no larger is sent in one request."""
PARTS_OF_A_SIZE = 1000
"""After so many parts they grow to twice the size: 8 GiB in parts of 8 MiB, 5 TB within the 10,000 parts that are allowed."""
COPY_BYTES = 1 << 30
"""Up to here a copy is one request. Stores allow 5 GiB, but some say nothing until such a copy is done."""
COPY_PART_BYTES = 512 << 20
_MOST_PARTS = 10_000
_TOKEN = "hardmoe-upload"


class Upload:
    """A multipart upload. Methods raise botocore's errors."""

    def __init__(self, blob: Blob) -> None:
        self._blob = blob
        self._token = secrets.token_hex(16)
        begun = patiently(lambda: blob.client.create_multipart_upload(**blob.address, Metadata={_TOKEN: self._token}))
        self._call = {**blob.address, "UploadId": begun["UploadId"]}
        self._parts: list[dict[str, Any]] = []

    @property
    def next_part_bytes(self) -> int:
        """Size of the next part, unless it is the last one."""
        return PART_BYTES << len(self._parts) // PARTS_OF_A_SIZE

    def send(self, data: bytes) -> None:
        """Add a part."""
        number = len(self._parts) + 1
        answer = patiently(lambda: self._blob.client.upload_part(**self._call, PartNumber=number, Body=data))
        self._parts.append({"PartNumber": number, "ETag": answer["ETag"]})

    def copy(self, source: Blob, etag: str, start: int, stop: int) -> None:
        """Add bytes [start, stop) of another object as a part."""
        number = len(self._parts) + 1
        options = {"CopySource": dict(source.address), "CopySourceIfMatch": etag, "CopySourceRange": f"bytes={start}-{stop - 1}"}
        answer = patiently(lambda: self._blob.client.upload_part_copy(**self._call, PartNumber=number, **options))
        self._parts.append({"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]})

    def complete(self) -> None:
        """Make the object of its parts."""
        patience = Patience()
        while True:
            try:
                self._blob.client.complete_multipart_upload(**self._call, MultipartUpload={"Parts": self._parts})
                return
            except ANSWERS as error:
                # The store forgets an upload that is complete: an earlier answer of ours was lost, or somebody aborted it.
                if patience.failed and code_of(error) == "NoSuchUpload" and self._is_there():
                    return
                patience.wait(error)

    def abort(self) -> None:
        """Give up what was sent; where that fails, `sweep` finds it later."""
        with contextlib.suppress(*ANSWERS):
            patiently(lambda: self._blob.client.abort_multipart_upload(**self._call))

    def _is_there(self) -> bool:
        found = patiently(lambda: self._blob.client.head_object(**self._blob.address))
        return bool(found["Metadata"].get(_TOKEN) == self._token)


class S3Output(HashingWriter):
    """An object being written; counts and hashes what passes through. Nothing is visible before the block ends well."""

    def __init__(self, blob: Blob) -> None:
        super().__init__()
        self._blob = blob
        self._buffer = bytearray()
        self._upload: Upload | None = None

    def write(self, data: bytes, /) -> int:
        """Append bytes."""
        view = self.note(data)
        self._buffer += view
        while len(self._buffer) > (self._upload.next_part_bytes if self._upload else PART_BYTES):
            self._send_part()
        return view.nbytes

    def __enter__(self) -> "S3Output":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException:
            kind = BaseException
            raise
        finally:
            if kind is not None and self._upload is not None:
                self._upload.abort()
            self._buffer = bytearray()

    def _send_part(self) -> None:
        with explained("write", self._blob.where, self._blob.client):
            self._upload = self._upload or Upload(self._blob)
            count = self._upload.next_part_bytes
            self._upload.send(bytes(memoryview(self._buffer)[:count]))
        del self._buffer[:count]

    def _finish(self) -> None:
        with explained("write", self._blob.where, self._blob.client):
            if self._upload is None:
                patiently(lambda: self._blob.put(self._buffer))
                return
            if self._buffer:
                self._upload.send(bytes(self._buffer))
            self._upload.complete()


def copy_object(source: Blob, target: Blob) -> None:
    """Copy within the store, in parts if it is large. Raises botocore's errors."""
    found = patiently(lambda: source.client.head_object(**source.address))
    size, etag = int(found["ContentLength"]), str(found["ETag"])
    if size <= COPY_BYTES:
        options = {"CopySource": dict(source.address), "CopySourceIfMatch": etag}
        patiently(lambda: target.client.copy_object(**target.address, **options))
        return
    step = max(COPY_PART_BYTES, -(-size // _MOST_PARTS))
    upload = Upload(target)
    try:
        for start in range(0, size, step):
            upload.copy(source, etag, start, min(size, start + step))
        upload.complete()
    except BaseException:
        upload.abort()
        raise
