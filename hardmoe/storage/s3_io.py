"""Objects as files that are read at any offset.

Readers such as pyarrow's Parquet and `tarfile` want a seekable file. Small reads are served from a window that is read
ahead, large ones as the exact range; every range is asked for the version seen at opening, so a file that is replaced
meanwhile is an error and never a mixture of two. Rejected: pyarrow's own S3 client, which would bring a second chain of
credentials and a second policy of retries; and temporary local copies, which need a disk that machines with an object
store often have not.
"""

import base64
import contextlib
import hashlib
import io
import threading
from collections.abc import Mapping
from typing import Any

from hardmoe.storage.s3_client import Patience
from hardmoe.storage.s3_errors import ANSWERS, explained, status_of

FIRST_BYTES = 256 << 10
"""What opening a file reads at once: all of a small one, so that it costs one request."""
READ_AHEAD_BYTES = 1 << 20
MOST_AHEAD_BYTES = 8 << 20
"""Reading straight on doubles what is read ahead, up to here."""
_CHUNK_BYTES = 256 << 10


class Blob:
    """One object: where it is for the store and for people, and the client that reaches it. Methods raise botocore's errors."""

    def __init__(self, client: Any, bucket: str, key: str, where: str) -> None:
        self.client = client
        self.bucket = bucket
        self.key = key
        self.address: Mapping[str, str] = {"Bucket": bucket, "Key": key}
        self.where = where

    def read(self) -> tuple[bytes, str]:
        """The whole content and its ETag, of one version even if it is replaced meanwhile."""
        while True:
            try:
                data, answer = self.fetch(0, None)
                return data, str(answer["ETag"])
            except ANSWERS as error:
                # The body broke off, and what it was of is there no more: take what is there now, from its beginning.
                if status_of(error) != 412:
                    raise

    def fetch(self, start: int, stop: int | None, etag: str | None = None) -> tuple[bytes, Mapping[str, Any]]:
        """Bytes [start, stop) and the store's last answer; a body that breaks off is asked for again from where it broke off.

        Args:
            start: the first byte.
            stop: the byte behind the last one; may lie behind the end. None for all.
            etag: the version wanted; another one is status 412. None for the one that is there.
        """
        data = bytearray()
        patience = Patience()
        while True:
            conditions = {} if etag is None else {"IfMatch": etag}
            if start + len(data) or stop is not None:
                conditions["Range"] = f"bytes={start + len(data)}-{'' if stop is None else stop - 1}"
            try:
                answer = self.client.get_object(**self.address, **conditions)
                etag = answer["ETag"]
                with contextlib.closing(answer["Body"]) as body:
                    while chunk := body.read(_CHUNK_BYTES):
                        data += chunk
                        patience.progress()
                return bytes(data), answer
            except ANSWERS as error:
                patience.wait(error)

    def put(self, data: bytes | bytearray, **conditions: str) -> None:
        """Send the content, once."""
        md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        self.client.put_object(**self.address, Body=bytes(data), ContentMD5=md5, **conditions)


class S3Input(io.BufferedIOBase):
    """One version of an object, open for reading at any offset."""

    def __init__(self, blob: Blob) -> None:
        super().__init__()
        self._blob = blob
        self._lock = threading.Lock()
        self._position = 0
        self._window, self._window_start = b"", 0
        self._ahead = READ_AHEAD_BYTES
        with explained("read", blob.where, blob.client):
            self._open()

    def _open(self) -> None:
        try:
            self._window, answer = self._blob.fetch(0, FIRST_BYTES)
        except ANSWERS as error:
            # An empty file has no first byte to ask for.
            if status_of(error) != 416:
                raise
            self._window, answer = self._blob.fetch(0, None)
        self._etag = str(answer["ETag"])
        total = str(answer.get("ContentRange", "")).rpartition("/")[2]
        self.size = int(total) if total else len(self._window)

    def read(self, size: int | None = -1, /) -> bytes:
        """So many bytes, fewer only at the end of the file; all that is left by default."""
        with self._lock:
            self._check_open()
            stop = self.size if size is None or size < 0 else min(self.size, self._position + size)
            data = self._range(self._position, stop) if stop > self._position else b""
            self._position += len(data)
            return data

    def read1(self, size: int = -1, /) -> bytes:
        """The same, at most what is read ahead at a time; `io.TextIOWrapper` calls this."""
        return self.read(size if size >= 0 else READ_AHEAD_BYTES)

    def peek(self, size: int = 0, /) -> bytes:
        """Bytes that come next, at least one before the end of the file, without moving; `readline` calls this."""
        with self._lock:
            self._check_open()
            if self._position < self.size:
                self._range(self._position, self._position + 1)
            return self._window[max(0, self._position - self._window_start) :]

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to an offset from the beginning, the present position or the end."""
        with self._lock:
            self._check_open()
            position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
            if position < 0:
                raise ValueError(f"negative position {position}")
            self._position = position
            return position

    def tell(self) -> int:
        """The present position."""
        return self._position

    def readable(self) -> bool:
        """Always true."""
        return True

    def seekable(self) -> bool:
        """Always true."""
        return True

    def close(self) -> None:
        """Let go of what was read ahead; nothing is open at the store."""
        self._window = b""
        super().close()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed file")

    def _range(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), which lie within the file."""
        end = self._window_start + len(self._window)
        inside = self._window_start <= start < end
        if inside and stop <= end:
            return self._window[start - self._window_start : stop - self._window_start]
        head = self._window[start - self._window_start :] if inside else b""
        begin = start + len(head)
        with explained("read", self._blob.where, self._blob.client):
            if stop - begin >= READ_AHEAD_BYTES:
                return head + self._blob.fetch(begin, stop, self._etag)[0]
            self._ahead = min(2 * self._ahead, MOST_AHEAD_BYTES) if begin == end else READ_AHEAD_BYTES
            last = min(self.size, begin + self._ahead)
            # At the end of the file, where Parquet has its footer, the window reaches back instead of ahead.
            first = begin if begin == end else max(0, min(begin, last - READ_AHEAD_BYTES))
            self._window = self._blob.fetch(first, last, self._etag)[0]
            self._window_start = first
        return head + self._window[begin - first : stop - first]
