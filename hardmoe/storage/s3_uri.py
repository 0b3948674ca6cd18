"""What an S3 root's URI says: `s3://bucket/prefix?endpoint=http://127.0.0.1:5000&region=eu-west-1&profile=me&anonymous=true`.

The URI is all that a worker on another machine gets, so it carries every option that is not in that machine's environment,
and never a credential: URIs land in recipes, records, logs and the report. Rejected: options as recipe keys of their own,
which a second root (`reuse`) or a collection in another store would each need again.
"""

import difflib
import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from hardmoe.errors import StorageError

SCHEME = "s3://"
_OPTIONS = ("endpoint", "region", "profile", "anonymous")
_BUCKET = re.compile(r"[a-zA-Z0-9.\-_]{3,255}")
_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclass(frozen=True)
class S3Access:
    """How to reach a store; what is None comes from boto3's standard environment variables and files."""

    endpoint: str | None = None
    """URL of the server; None for AWS itself, or `AWS_ENDPOINT_URL`."""
    region: str | None = None
    """Name of the region; None for `AWS_REGION` or the profile's."""
    profile: str | None = None
    """A section of `~/.aws/config`; None for `AWS_PROFILE` or the default one."""
    anonymous: bool = False
    """Send no credentials, as public buckets want it."""

    def query(self) -> str:
        """The options as they stand in a URI, with the question mark; empty if there are none."""
        values = {"endpoint": self.endpoint, "region": self.region, "profile": self.profile}
        pairs = [f"{name}={quote(value, safe=':/')}" for name, value in values.items() if value is not None]
        pairs += ["anonymous=true"] if self.anonymous else []
        return "?" + "&".join(pairs) if pairs else ""


@dataclass(frozen=True)
class S3Place:
    """A bucket, a prefix in it, and how to reach them."""

    bucket: str
    prefix: str
    """Without slashes at its ends; empty for the whole bucket."""
    access: S3Access

    def uri(self, path: str = "") -> str:
        """The URI of what lies below, with the options; `parse_s3_uri` understands it."""
        return self.where(path).replace("%", "%25").replace("?", "%3F").replace("#", "%23") + self.access.query()

    def where(self, path: str = "") -> str:
        """The same for people: no options, and names as they are."""
        return SCHEME + "/".join(part for part in (self.bucket, self.prefix, path) if part)


def parse_s3_uri(uri: str) -> S3Place:
    """Read a URI that begins with `s3://`; percent signs escape, as in `file://`.

    Raises:
        StorageError: no bucket, an unknown or malformed option, or credentials, which do not belong there.
    """
    place, _, query = uri[len(SCHEME) :].partition("?")
    bucket, _, prefix = place.partition("/")
    if "@" in bucket:
        raise StorageError(
            f"a URI must hold no credentials, but one for s3://{bucket.rpartition('@')[2]} does; take them out and set "
            "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if not _BUCKET.fullmatch(bucket):
        raise StorageError(f"cannot use '{SCHEME}{place}': '{bucket}' is no bucket name; write s3://bucket/prefix")
    prefix = unquote(prefix).strip("/")
    if ".." in prefix.split("/") or any(ord(character) < 32 for character in prefix):
        raise StorageError(f"cannot use '{SCHEME}{place}': a prefix must be without '..' and without control characters")
    return S3Place(bucket, prefix, _access(f"{SCHEME}{place}", query))


def _access(place: str, query: str) -> S3Access:
    given: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in _OPTIONS:
            near = difflib.get_close_matches(name, _OPTIONS, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(_OPTIONS)}"
            # The value stays out: people try `secret_key=...`.
            raise StorageError(f"{place} has an unknown option '{name}'; {hint}")
        if not value or name in given:
            raise StorageError(f"{place}: give the option '{name}' once and with a value, or leave it out")
        given[name] = value
    _check_endpoint(place, given.get("endpoint"))
    if (anonymous := _TRUTH.get(given.get("anonymous", "false").lower())) is None:
        raise StorageError(f"{place}: the option 'anonymous' is '{given['anonymous']}'; write anonymous=true, or leave it out")
    if anonymous and "profile" in given:
        raise StorageError(f"{place}: the options 'anonymous' and 'profile' exclude each other; leave one of them out")
    return S3Access(given.get("endpoint"), given.get("region"), given.get("profile"), anonymous)


def _check_endpoint(place: str, endpoint: str | None) -> None:
    if endpoint is None:
        return
    wrong = StorageError(f"{place}: the option 'endpoint' is '{endpoint}'; write it as endpoint=https://host:port")
    try:
        parts = urlsplit(endpoint)
        _ = parts.port
    except ValueError as error:
        raise wrong from error
    if "@" in parts.netloc:
        raise StorageError(f"{place}: the option 'endpoint' must hold no credentials; take them out and set AWS_PROFILE")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise wrong
