"""Text of the user's that is no UTF-8, told by its first bytes: what spreadsheets save as "Unicode text" is UTF-16.

Every second byte of it is zero, so that it passes for UTF-8 with odd characters, or for a row that is broken. Rejected: to read
it as well, since tables are entered at byte offsets, and its lines cannot be found by a byte.
"""

from pathlib import PurePosixPath

from hardmoe.errors import DataError

HEAD_BYTES = 4
"""So many bytes are looked at."""
_MARKS = ((b"\xff\xfe\0\0", "UTF-32"), (b"\0\0\xfe\xff", "UTF-32"), (b"\xff\xfe", "UTF-16"), (b"\xfe\xff", "UTF-16"))
_ZEROS = {0b1110: "UTF-32LE", 0b0111: "UTF-32BE", 0b1010: "UTF-16LE", 0b0101: "UTF-16BE", 0b10: "UTF-16LE", 0b01: "UTF-16BE"}
"""Where the zeros are in a text without a mark that begins with an ASCII character or two, the first byte lowest."""


def check_utf8(head: bytes, place: str) -> None:
    """Refuse text that begins like UTF-16 or UTF-32.

    Args:
        head: the first bytes of the file, `HEAD_BYTES` of them if there are so many.
        place: the file's path or URI.

    Raises:
        DataError: says which encoding it is and how to convert it.
    """
    head = head[:HEAD_BYTES]
    zeros = sum(1 << at for at, byte in enumerate(head) if not byte)
    found = next((name for mark, name in _MARKS if head.startswith(mark)), _ZEROS.get(zeros))
    if found is None:
        return
    name = PurePosixPath(place)
    raise DataError(
        f"{place} is text in {found}, not in UTF-8; save it as UTF-8, or convert it with "
        f"'iconv -f {found} -t UTF-8 {name.name} > {name.stem}-utf8{name.suffix}' and name that file"
    )
