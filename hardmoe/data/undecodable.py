"""The one exception of decoding, apart from the decoders so that each of them may raise it."""

from hardmoe.errors import HardmoeError


class UndecodableImageError(HardmoeError):
    """Bytes that are no usable image; the message is a short reason."""
