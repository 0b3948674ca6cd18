"""What a server allows: how large a body may be, how long it may take to arrive and to be answered, who may ask.

Every limit has its status: 401 without the token, 408 for slow senders, 413 for large bodies, 503 when too much is waiting.
Rejected: a reverse proxy's limits, which a server that people start on their own machines does not have.
"""

import asyncio
import hmac
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request


@dataclass(frozen=True)
class Limits:
    """See the module."""

    max_body_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000
    max_images: int = 64
    """In one request."""
    body_seconds: float = 10.0
    """In which a body must have arrived."""
    answer_seconds: float = 60.0
    max_tags: int = 1000
    max_neighbours: int = 200
    max_connections: int = 512
    """At a time; others are answered 503."""


def check_token(request: Request, token: str | None) -> None:
    """Refuse whoever does not send `Authorization: Bearer TOKEN`.

    Raises:
        HTTPException: 401.
    """
    if token is None:
        return
    given = request.headers.get("authorization", "")
    if not hmac.compare_digest(given.encode(errors="replace"), f"Bearer {token}".encode()):
        raise HTTPException(401, "send the header 'Authorization: Bearer TOKEN'", headers={"WWW-Authenticate": "Bearer"})


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body, as far as it is allowed.

    Raises:
        HTTPException: 400 for a length that is none, 408 if it takes too long, 413 if it is too large.
    """
    too_large = HTTPException(413, f"the body is larger than {limits.max_body_bytes:,} bytes", headers={"Connection": "close"})
    declared = request.headers.get("content-length")
    if declared is not None and (not (declared.isascii() and declared.isdigit()) or len(declared) > 18):
        raise HTTPException(400, "the header Content-Length is no number")
    if declared is not None and int(declared) > limits.max_body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.max_body_bytes:
                    raise too_large
    except TimeoutError:
        sentence = f"the body did not arrive in {limits.body_seconds:g} seconds"
        raise HTTPException(408, sentence, headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise HTTPException(400, "the connection was closed before the body's end") from None
    return bytes(body)
