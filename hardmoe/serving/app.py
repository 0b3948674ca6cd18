"""The application: routes, from requests to answers and from errors to statuses. It knows an engine, not where that computes.

    POST /predict /embed /search     as `schema.py` describes
    GET  /                           a page to try it; /openapi.json, /docs what there is; /health, /metrics
    GET  /experts/{number}           typical images of an expert's part; /thumbnails/{row} an image of the index

Rejected: a framework that reads requests by the handlers' annotations; bodies are read here, piece by piece, and then parsed.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from importlib.resources import files as package_files
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

import hardmoe
from hardmoe.errors import DataError, HardmoeError
from hardmoe.mixture import Mixture, Prediction
from hardmoe.searching.search import SearchIndex
from hardmoe.serving.engine import BusyError, Decoders, Engine, Found
from hardmoe.serving.limits import Limits, check_token, read_body
from hardmoe.serving.metrics import Metrics
from hardmoe.serving.schema import OCTETS, ImagesRequest, PredictRequest, SearchRequest, openapi

_LONGEST_PLACE, _LONGEST_NUMBER = 200, 10
_MISTAKE = "the server cannot answer; its log says why"
_LOG = logging.getLogger("uvicorn.error")
Body = TypeVar("Body", bound=BaseModel)
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass
class Service:
    """All that the routes need."""

    mixture: Mixture
    engine: Engine
    index: SearchIndex | None
    limits: Limits = field(default_factory=Limits)
    token: str | None = None
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self.decoders = Decoders(self.mixture, self.limits.max_pixels)

    async def predict(self, request: Request) -> Response:
        """`POST /predict`."""
        asked = await self._asked(request, PredictRequest, "k", self.limits.max_tags)
        found = await self._found(asked.images)
        best = await asyncio.to_thread(self._best, found, asked.k)
        predictions = [
            {
                "expert": each.expert,
                "tags": [{"tag": t, "probability": p} for t, p in zip(each.tags, each.probabilities, strict=True)],
            }
            for each in best
        ]
        return JSONResponse({"predictions": predictions})

    def _best(self, found: Found, k: int) -> list[Prediction]:
        return self.mixture.best(self.mixture.decode(found.unified_NZ), found.experts_N, k, found.refused_N)

    async def embed(self, request: Request) -> Response:
        """`POST /embed`."""
        asked = await self._asked(request, ImagesRequest, None, 0)
        found = await self._found(asked.images)
        return JSONResponse({"experts": found.experts_N.tolist(), "embeddings": found.unified_NZ.tolist()})

    async def search(self, request: Request) -> Response:
        """`POST /search`."""
        asked = await self._asked(request, SearchRequest, "n", self.limits.max_neighbours)
        if self.index is None:
            raise HTTPException(503, "there is no index; make one with 'hardmoe index', and start again")
        if (asked.image is None) == (asked.tag is None):
            raise HTTPException(422, "give an image or a tag, and not both")
        if asked.tag is not None:
            try:
                near = await asyncio.to_thread(self.index.of_tag, asked.tag, asked.n)
            except DataError as error:
                raise HTTPException(404, str(error)) from error
        else:
            assert asked.image is not None
            unified_NZ = (await self._found([asked.image])).unified_NZ
            near = (await asyncio.to_thread(self.index.of_vectors, unified_NZ.numpy(), asked.n))[0]
        return JSONResponse({"neighbours": [asdict(each) for each in near]})

    async def expert(self, request: Request) -> Response:
        """`GET /experts/{number}`: typical images of its part, as the run's report chose them."""
        number = _number(request.path_params["number"], self.mixture.num_experts)
        if number is None:
            raise HTTPException(404, f"there are experts 0 to {self.mixture.num_experts - 1}")
        parts = await asyncio.to_thread(self._parts)
        typical = parts[number]["typical"] if number < len(parts) else []
        return JSONResponse({"expert": number, "typical": [each["image"] for each in typical]})

    async def thumbnail(self, request: Request) -> Response:
        """`GET /thumbnails/{row}`."""
        row = _number(request.path_params["row"], 0 if self.index is None else len(self.index))
        image = None if self.index is None or row is None else await asyncio.to_thread(self.index.thumbnail, row)
        if image is None:
            raise HTTPException(404, "there is no such thumbnail")
        return Response(image, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    async def health(self, request: Request) -> Response:
        """`GET /health`."""
        index = None if self.index is None else len(self.index)
        return JSONResponse({"status": "ready", "experts": self.mixture.num_experts, "indexed": index})

    async def prometheus(self, request: Request) -> Response:
        """`GET /metrics`."""
        self.metrics.experts_held.set(await self.engine.num_held())
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def description(self, request: Request) -> Response:
        """`GET /openapi.json`."""
        return JSONResponse(openapi(hardmoe.__version__, self.limits, self.token))

    def _parts(self) -> list[dict[str, Any]]:
        report = self.mixture.store.find("report")
        if report is None:
            return []
        parts: list[dict[str, Any]] = json.loads(report.storage.read_bytes(report.path("data.json")))["parts"]
        return parts

    async def _asked(self, request: Request, model: type[Body], number: str | None, most: int) -> Body:
        """The request, whichever of the two forms it has."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in ("application/json", OCTETS) and not kind.startswith("image/"):
            raise HTTPException(415, f"send application/json, {OCTETS} or image/*, not '{kind[:60]}'")
        body = await read_body(request, self.limits)
        try:
            asked = model.model_validate_json(body) if kind == "application/json" else _of_image(model, body, request, number)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            status = 400 if first["type"] == "json_invalid" else 422
            # A key that is not known is part of the place, and may be as long as the body.
            place = ".".join(map(str, first["loc"]))[:_LONGEST_PLACE] or "the body"
            raise HTTPException(status, f"{place}: {first['msg']}") from error
        if number is not None and getattr(asked, number) > most:
            raise HTTPException(413, f"{number} is {most} at most")
        if len(getattr(asked, "images", [])) > self.limits.max_images:
            raise HTTPException(413, f"more than {self.limits.max_images} images in one request")
        return asked

    async def _found(self, images: list[bytes]) -> Found:
        async with asyncio.timeout(self.limits.answer_seconds):
            pixels_N3SS = await self.decoders(images)
            self.metrics.images.inc(len(images))
            return await self.engine.embed(pixels_N3SS)


def _number(text: str, end: int) -> int | None:
    """A number below `end` in a path, or None; Python itself refuses to read one of thousands of digits."""
    number = int(text) if text.isascii() and text.isdigit() and len(text) < _LONGEST_NUMBER else end
    return number if number < end else None


def _of_image(model: type[Body], body: bytes, request: Request, number: str | None) -> Body:
    """A body that is an image, with its number from the query."""
    import base64

    encoded = base64.b64encode(body).decode()
    given: dict[str, Any] = {"image": encoded} if model is SearchRequest else {"images": [encoded]}
    if number is not None and number in request.query_params:
        text = request.query_params[number]
        given[number] = int(text) if text.isascii() and text.isdigit() and len(text) < _LONGEST_NUMBER else text
    return model.model_validate(given)


Handler = Callable[[Request], Awaitable[Response]]


def build_app(service: Service) -> Starlette:
    """The application of a service."""

    def route(path: str, handler: Handler, *, method: str = "GET", is_open: bool = False) -> Route:
        async def handle(request: Request) -> Response:
            with service.metrics.measured(path) as outcome:
                response = await _answered(service, handler, request, is_open)
                outcome(response.status_code)
            response.headers.update(_HEADERS)
            return response

        return Route(path, handle, methods=[method])

    page = package_files("hardmoe.serving")

    async def index_page(request: Request) -> Response:
        return HTMLResponse(page.joinpath("page.html").read_text(encoding="utf-8"))

    async def docs_page(request: Request) -> Response:
        return HTMLResponse(page.joinpath("docs.html").read_text(encoding="utf-8"))

    async def plain_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, headers={**_HEADERS, **(error.headers or {})})

    routes = [
        route("/predict", service.predict, method="POST"),
        route("/embed", service.embed, method="POST"),
        route("/search", service.search, method="POST"),
        route("/experts/{number}", service.expert),
        route("/thumbnails/{row}", service.thumbnail),
        route("/health", service.health, is_open=True),
        route("/metrics", service.prometheus),
        route("/openapi.json", service.description, is_open=True),
        route("/docs", docs_page, is_open=True),
        route("/", index_page, is_open=True),
    ]

    async def mistake(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": _MISTAKE}, 500, headers=_HEADERS)

    return Starlette(routes=routes, exception_handlers={HTTPException: plain_error, Exception: mistake})


async def _answered(service: Service, handler: Handler, request: Request, is_open: bool) -> Response:
    """The handler's answer, or the error's own."""
    try:
        if not is_open:
            check_token(request, service.token)
        return await handler(request)
    except HTTPException as error:
        return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)
    except DataError as error:
        return JSONResponse({"error": str(error)}, 400)
    except BusyError as error:
        return JSONResponse({"error": str(error)}, 503, headers={"Retry-After": "1"})
    except HardmoeError as error:
        # Nothing that the client did, and places of this machine are none of its business.
        _LOG.error("%s %s: %s", request.method, request.url.path, error)
        return JSONResponse({"error": _MISTAKE}, 500)
    except TimeoutError:
        return JSONResponse({"error": "it took too long; try again in a moment"}, 503, headers={"Retry-After": "5"})
