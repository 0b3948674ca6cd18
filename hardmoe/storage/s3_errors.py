"""What a store can answer instead of success: which of it passes by waiting, and one sentence with the remedy for the rest.

A request is repeated when the store is busy or broken, or the connection was; never when it understood and refused.
Rejected: showing botocore's own texts, which name the operation and not the file, and never the remedy.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import urllib3.exceptions
from botocore import exceptions as failures
from botocore.parsers import ResponseParserError

from hardmoe.errors import MissingFileError, StorageError, StoreAwayError
from hardmoe.storage.s3_silence import listened_for

_CUT = (
    failures.HTTPClientError,
    failures.ConnectionError,
    failures.IncompleteReadError,
    ResponseParserError,
    urllib3.exceptions.HTTPError,
)
"""Connections that were refused, broke off or fell silent, before or within the answer."""
ANSWERS = (failures.ClientError, failures.BotoCoreError, *_CUT)
"""All that a request may end with, apart from success."""

_PASSING = {
    "BadDigest",
    "BandwidthLimitExceeded",
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestThrottled",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
"""Error codes after which the same request may succeed, whatever the HTTP status."""
_PASSING_STATUS = {429, 500, 502, 503, 504}


def status_of(error: BaseException) -> int:
    """The HTTP status that the store answered with; 0 if there was no answer."""
    if not isinstance(error, failures.ClientError):
        return 0
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: BaseException) -> str:
    """The store's own word for the error, such as `NoSuchKey`; answers to HEAD have the status only (`404`)."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, failures.ClientError) else ""


def is_missing(error: BaseException) -> bool:
    """Whether the store says that there is no such file (a missing bucket is another matter, where it can be told)."""
    return code_of(error) in ("NoSuchKey", "404", "NotFound")


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, failures.ClientError):
        return code_of(error) in _PASSING or status_of(error) in _PASSING_STATUS
    if isinstance(error, failures.SSLError) and "CERTIFICATE" in str(error).upper():
        return False
    return isinstance(error, _CUT)


@contextlib.contextmanager
def explained(verb: str, where: str, client: Any) -> Iterator[None]:
    """Turn what a store answers into one sentence with the remedy, and tell if it does not answer."""
    endpoint = str(client.meta.endpoint_url)
    try:
        with listened_for(endpoint, f"{verb} {where}"):
            yield
    except ANSWERS as error:
        kind = MissingFileError if is_missing(error) else StoreAwayError if is_passing(error) else StorageError
        raise kind(f"cannot {verb} {where}: {_explanation(error, endpoint)}") from error


_FULL = "the store is full; free some space and run again, finished work is kept"
_REPLACED = "it was replaced meanwhile; run again when nothing else writes there"
_SENTENCES = {
    "NoSuchKey": "there is no such file",
    "404": "there is no such file",
    "NoSuchBucket": "there is no such bucket; create it, or correct its name or the option 'endpoint'",
    "PreconditionFailed": _REPLACED,
    "412": _REPLACED,
    "400": "the store refuses the request (400); check the option 'region', and whether the credentials have expired",
    "RequestTimeTooSkewed": "this machine's clock is too far off; set it",
    "NotImplemented": "this store lacks conditional writes (If-None-Match); use one that has them, such as AWS S3 or MinIO",
    "KeyTooLongError": "the name is too long for the store; choose a shorter root",
    "QuotaExceeded": _FULL,
    "XMinioStorageFull": _FULL,
}
_REFUSED_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "ExpiredTokenException", "InvalidToken"}
_ELSEWHERE = {
    "PermanentRedirect",
    "TemporaryRedirect",
    "AuthorizationHeaderMalformed",
    "IllegalLocationConstraintException",
    "301",
    "307",
}
_NO_KEYS = (
    failures.NoCredentialsError,
    failures.PartialCredentialsError,
    failures.CredentialRetrievalError,
    failures.TokenRetrievalError,
    failures.SSOError,
)


def _explanation(error: Exception, endpoint: str) -> str:
    code, status = code_of(error), status_of(error)
    if code in _SENTENCES:
        return _SENTENCES[code]
    if code in _REFUSED_KEYS:
        return f"the credentials are refused ({code}); renew them, or choose others with AWS_PROFILE or '?profile='"
    if code in _ELSEWHERE:
        return f"the bucket is in another region{_true_region(error)} ({code}); name it with '?region='"
    if status in (401, 403):
        return (
            f"access is denied ({code}); allow these credentials to read, write and list there, or choose others with "
            "AWS_PROFILE or '?profile='"
        )
    if isinstance(error, _NO_KEYS):
        return (
            f"no usable credentials ({_first_line(error)}); set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or add '?anonymous=true' for a public bucket"
        )
    if status and is_passing(error):
        return f"{endpoint} keeps answering {status} {code}; run again later or with less in parallel, finished work is kept"
    if status:
        return f"{endpoint} answered {status} {code}; check that it is an S3 store and allows the request"
    return f"{endpoint} does not answer ({_first_line(error)}); correct the option 'endpoint' or the network, then run again"


def _true_region(error: Exception) -> str:
    headers = error.response["ResponseMetadata"].get("HTTPHeaders", {}) if isinstance(error, failures.ClientError) else {}
    region = headers.get("x-amz-bucket-region")
    return f", {region}" if region else ""


def _first_line(error: Exception) -> str:
    """botocore's text up to the objects and addresses that its libraries put into it."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text.partition(": <")[0].partition(" object at 0x")[0].rstrip(":")
