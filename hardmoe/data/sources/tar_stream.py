"""A tar archive read once from front to back, nothing believed: not its sizes, not its end.

`tarfile` reads the headers, with three precautions. It takes any broken header behind the first for the end of the archive,
so a cut or overwritten archive would pass for a shorter one; here only the mark of the end is the end. It skips a member by
reading up to a size that the header claims, for ever if it claims an exabyte; here what is skipped must be there. It loads
extended headers whole, however long; here they are bounded. Names are only names: nothing is written to disk. Rejected:
opening for random access, which reads an object store's tar in thousands of requests.
"""

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, BinaryIO, Self, cast

from hardmoe.errors import DataError

_CHUNK_BYTES = 1 << 20
_MOST_HEADER_BYTES = 1 << 20
_HEADERS = frozenset(
    {tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK}
)
_GZIP = b"\x1f\x8b"

# What tarfile and the decompressors let through on hostile archives, besides their own errors.
_BROKEN = (tarfile.TarError, OSError, EOFError, ValueError, LookupError, OverflowError, zlib.error)


class DamagedTarError(DataError):
    """The archive cannot be read to its end; the message says why and does not name it."""


class _Header(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        is_end = len(buf) == tarfile.BLOCKSIZE and not any(buf)
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if is_end:
                raise
            # A HeaderError would be taken for the end of the archive.
            raise tarfile.ReadError("the end is missing" if not buf else str(error)) from error
        if header.type in _HEADERS and header.size > _MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header of {header.size} bytes")
        return header


class TarStream:
    """The members of one archive, compressed by gzip or not, in order.

    Args:
        source: positioned at the archive's beginning; the caller closes it.

    Raises:
        DamagedTarError: it does not begin like an archive.
    """

    def __init__(self, source: BinaryIO) -> None:
        self.is_compressed = source.read(len(_GZIP)) == _GZIP
        source.seek(0)
        try:
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=source, mode="rb")) if self.is_compressed else source
            # The small default block on purpose: tarfile copies the rest of a block with every header it takes from it.
            self._tar = tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header)  # noqa: SIM115
        except _BROKEN as error:
            raise DamagedTarError(_reason(error)) from error
        self._stream = cast(IO[bytes], self._tar.fileobj)

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        """Headers one by one; `read` gives the data of the latest.

        Raises:
            DamagedTarError: the archive is cut off or overwritten here.
        """
        while True:
            try:
                member = self._tar.next()
                # Or it keeps every header of the archive.
                self._tar.members = []  # type: ignore[attr-defined]
                # What follows the end's mark is read for the sake of the compressor's checksum.
                while member is None and self.is_compressed and self._stream.read(_CHUNK_BYTES):
                    continue
            except _BROKEN as error:
                raise DamagedTarError(_reason(error)) from error
            if member is None:
                return
            if member.size < 0:
                raise DamagedTarError("a member of negative size")
            yield member
            self._skip(self._tar.offset - self._stream.tell())

    def read(self, member: tarfile.TarInfo) -> bytes:
        """The data of the latest member, a plain file; call it once.

        Raises:
            DamagedTarError: the archive ends before the data do.
        """
        return self._take(member.size)

    def _skip(self, num_bytes: int) -> None:
        if num_bytes < 0:
            raise DamagedTarError("a member of negative size")
        while num_bytes:
            num_bytes -= len(self._take(min(num_bytes, _CHUNK_BYTES)))

    def _take(self, num_bytes: int) -> bytes:
        try:
            data = self._stream.read(num_bytes)
        except _BROKEN as error:
            raise DamagedTarError(_reason(error)) from error
        if len(data) < num_bytes:
            raise DamagedTarError("unexpected end of data")
        return data


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
