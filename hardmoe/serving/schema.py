"""What is asked and answered over HTTP, and the OpenAPI description of it.

A request is either JSON with images in base64, or one encoded image as it is (`curl --data-binary @photo.jpg`), its numbers then
in the query. Rejected: multipart forms, whose parsers have a history of their own and which say nothing more.
"""

import base64
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from hardmoe.serving.limits import Limits

OCTETS = "application/octet-stream"


def _decoded(text: Any) -> Any:
    """Bytes of base64 without a character too many; pydantic's own passes over what is none."""
    if not isinstance(text, str):
        raise ValueError("give a string of base64")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError("this is no base64") from None


Base64Bytes = Annotated[
    bytes,
    BeforeValidator(_decoded),
    WithJsonSchema({"type": "string", "contentEncoding": "base64", "minLength": 4}),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ImagesRequest(_Strict):
    """Some images."""

    images: list[Base64Bytes] = Field(min_length=1, description="Encoded images, each in base64.")


class PredictRequest(ImagesRequest):
    """Some images, and how many tags of each are wanted."""

    k: int = Field(10, ge=1, description="Tags of each image.")


class SearchRequest(_Strict):
    """An image or a hashtag whose neighbours are wanted."""

    image: Base64Bytes | None = Field(None, description="An encoded image in base64.")
    tag: str | None = Field(None, max_length=200, description="A hashtag, with or without #.")
    n: int = Field(10, ge=1, description="How many neighbours.")


class TagScore(_Strict):
    """A hashtag."""

    tag: str
    probability: float


class Predicted(_Strict):
    """An image's hashtags, best first; none of an image that is refused (`hardmoe serve --coverage`)."""

    expert: int = Field(description="Which expert answered.")
    tags: list[TagScore]


class PredictAnswer(_Strict):
    """In the order of the images."""

    predictions: list[Predicted]


class EmbedAnswer(_Strict):
    """In the order of the images."""

    experts: list[int]
    embeddings: list[list[float]] = Field(description="Places in the unified space.")


class Near(_Strict):
    """An image that was found."""

    row: int = Field(description="Its number in the index; /thumbnails/{row} shows it.")
    example_id: str
    source_uri: str
    expert: int
    cosine: float


class SearchAnswer(_Strict):
    """Nearest first."""

    neighbours: list[Near]


class ExpertAnswer(_Strict):
    """What an expert sees."""

    expert: int
    typical: list[str] = Field(description="Images of its part, as data: URLs.")


class HealthAnswer(_Strict):
    """What there is."""

    status: Literal["ready"]
    experts: int
    indexed: int | None = Field(description="Images in the index.")


class Problem(_Strict):
    """Why there is no answer."""

    error: str


_ERRORS = {
    "400": "an image that cannot be decoded, or a body that is no JSON",
    "401": "no token, or a wrong one",
    "404": "no such hashtag, expert or image",
    "408": "the body took too long",
    "413": "the body, or a number, is too large",
    "415": "a content type that is neither JSON nor an image",
    "422": "JSON of another shape",
    "500": "a mistake of the server's",
    "503": "too much is waiting, too many are connected, or there is no index",
}


def openapi(version: str, limits: Limits, token: str | None) -> dict[str, Any]:
    """The description of all that is served, as OpenAPI 3.1."""
    requests: list[type[BaseModel]] = [PredictRequest, ImagesRequest, SearchRequest]
    answers: list[type[BaseModel]] = [PredictAnswer, EmbedAnswer, SearchAnswer, ExpertAnswer, HealthAnswer, Problem]
    schemas: dict[str, Any] = {}
    for model in (*requests, *answers):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    paths = {
        "/predict": _post("Hashtags of images.", PredictRequest, PredictAnswer, ("k", limits.max_tags)),
        "/embed": _post("Places of images in the unified space.", ImagesRequest, EmbedAnswer, None),
        "/search": _post("Images nearest to an image or a hashtag.", SearchRequest, SearchAnswer, ("n", limits.max_neighbours)),
        "/experts/{number}": _get("Typical images of an expert's part.", ExpertAnswer, ("401", "404", "503"), "number"),
        "/thumbnails/{row}": _get("An image of the index, small.", "image/jpeg", ("401", "404", "503"), "row"),
        "/health": _get("Whether it is ready.", HealthAnswer, ("503",)),
        "/metrics": _get("Numbers for Prometheus.", "text/plain", ("401", "503")),
    }
    body: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "hardmoe", "version": version},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if token is not None:
        body["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        body["security"] = [{"token": []}]
    return body


def _ref(model: type[BaseModel]) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}


def _problems(codes: Iterable[str]) -> dict[str, Any]:
    """Answers without what was asked for; too many connections are answered in plain text, before anything is read."""
    found = {code: {"description": _ERRORS[code], "content": _ref(Problem)} for code in codes}
    if "503" in found:
        found["503"]["content"] = {**_ref(Problem), "text/plain": {"schema": {"type": "string"}}}
    return found


def _get(summary: str, answer: type[BaseModel] | str, problems: Iterable[str], number: str | None = None) -> dict[str, Any]:
    """An operation whose answer is JSON or of another content type, and whose path may end in a number."""
    plain = {"type": "string"} if answer == "text/plain" else {"type": "string", "format": "binary"}
    content = {answer: {"schema": plain}} if isinstance(answer, str) else _ref(answer)
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": {"description": "The answer.", "content": content}, **_problems(problems)},
    }
    if number is not None:
        schema = {"type": "integer", "minimum": 0}
        operation["parameters"] = [{"name": number, "in": "path", "required": True, "schema": schema}]
    return {"get": operation}


def _post(summary: str, request: type[BaseModel], answer: type[BaseModel], number: tuple[str, int] | None) -> dict[str, Any]:
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": _ref(answer)}, **_problems(_ERRORS)}
    image = {"schema": {"type": "string", "format": "binary"}}
    operation: dict[str, Any] = {
        "summary": summary,
        "requestBody": {"required": True, "content": {**_ref(request), OCTETS: image, "image/*": image}},
        "responses": responses,
    }
    if number is not None:
        name, most = number
        schema = {"type": "integer", "minimum": 1, "maximum": most, "default": 10}
        words = "Where the body is an image: how many are wanted."
        operation["parameters"] = [{"name": name, "in": "query", "schema": schema, "description": words}]
    return {"post": operation}
