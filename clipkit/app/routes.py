"""Routes of the page: /api/classify, similarity, search, draw and others, and how errors are answered."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import python_multipart  # noqa: F401 - FastAPI needs it for forms, and does not fail before the first one
from fastapi import APIRouter, FastAPI, File, Form, Request
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from clipkit._version import __version__
from clipkit.app import limits
from clipkit.app.draw_queue import DrawBody, DrawQueue
from clipkit.app.guard import Guard, Rate, error_response
from clipkit.app.inference import Inference
from clipkit.app.limits import MAX_LABELS, MAX_PICTURES, MAX_TEXT
from clipkit.app.state import AppState
from clipkit.errors import ClipkitError, DataError, UsageError
from clipkit.zeroshot.heads import embed_texts
from clipkit.zeroshot.similarity import unknown_words

LOCAL = frozenset({"localhost"})
"""Host names of this machine that cannot be made to point elsewhere."""
_PAGE = Path(__file__).parents[1] / "assets" / "app"

Text = Annotated[str, Form(min_length=1, max_length=MAX_TEXT)]
Texts = Annotated[str, Form(min_length=1, max_length=MAX_LABELS * MAX_TEXT)]
Picture = Annotated[bytes, File()]


def make_app(state: AppState, names: Collection[str] = LOCAL) -> FastAPI:
    """The page and its routes, for requests to this machine's address or to a host name in `names`."""
    handlers = {
        ClipkitError: _on_clipkit_error,
        RequestValidationError: _on_invalid_request,
        HTTPException: _on_http_exception,
        Exception: _on_exception,
    }
    app = FastAPI(
        title="clipkit",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        exception_handlers=handlers,  # type: ignore[arg-type]  # each takes one class of exceptions
    )
    app.add_middleware(Guard, rate=Rate(limits.REQUESTS_PER_MINUTE), names=frozenset(map(str.lower, names)))
    inference = Inference(state.clip)
    for router in (_picture_routes(inference), _search_routes(state, inference), _draw_routes(state)):
        app.include_router(router, prefix="/api")
    app.mount("/", StaticFiles(directory=_PAGE, html=True))
    return app


async def _on_clipkit_error(_: Request, error: ClipkitError) -> JSONResponse:
    return error_response(400, str(error))


async def _on_invalid_request(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    message = first["msg"] if first["msg"][1:2].isupper() else first["msg"][:1].lower() + first["msg"][1:]
    return error_response(422, f"{first['loc'][-1]}: {message}")


async def _on_http_exception(_: Request, error: HTTPException) -> JSONResponse:
    return error_response(error.status_code, str(error.detail))


async def _on_exception(_: Request, error: Exception) -> JSONResponse:
    return error_response(500, "that failed; the terminal shows why")


def _picture_routes(inference: Inference) -> APIRouter:
    """Zero-shot classification of a picture, and cosines of pictures and texts."""
    router = APIRouter()

    @router.post("/classify")
    def classify(picture: Picture, labels: Texts, template: Text) -> dict[str, Any]:
        names = _lines(labels, ",")
        found = inference.classify(picture, names, template)
        return {"guesses": [asdict(guess) for guess in found], "unknown_words": unknown_words(inference.clip, names)}

    @router.post("/similarity")
    def compare(pictures: Annotated[list[bytes], File()], texts: Texts) -> dict[str, Any]:
        if len(pictures) > MAX_PICTURES:
            raise UsageError(f"{len(pictures)} pictures were sent; at most {MAX_PICTURES} are compared")
        lines = _lines(texts, "\n")
        cosines = embed_texts(inference.clip.model, inference.clip.tokenizer, lines) @ inference.embed(pictures).T
        return {"texts": lines, "cosines": cosines.tolist(), "unknown_words": unknown_words(inference.clip, lines)}

    return router


def _search_routes(state: AppState, inference: Inference) -> APIRouter:
    """The gallery: nearest neighbours of a text or a picture, and thumbnails."""
    router = APIRouter()

    @router.post("/search")
    def find(text: Annotated[str, Form(max_length=MAX_TEXT)] = "", picture: Picture = b"") -> dict[str, Any]:
        if bool(text.strip()) == bool(picture):
            raise UsageError("describe a picture, or give one" + (", not both" if picture else ""))
        query = inference.embed([picture]) if picture else embed_texts(state.clip.model, state.clip.tokenizer, [text])
        hits = state.index.search(query, k=24)[0]
        return {"hits": [asdict(hit) for hit in hits], "unknown_words": unknown_words(state.clip, [text])}

    @router.get("/some/{n}")
    def some(n: Annotated[int, PathParameter(ge=1, le=MAX_PICTURES)]) -> dict[str, list[int]]:
        return {"rows": random.sample(state.index.rows, min(n, len(state.index)))}

    @router.get("/picture/{row}")
    def picture_of(row: int) -> Response:
        if not 0 <= row < len(state.gallery):
            raise HTTPException(404, f"there is no picture {row}")
        try:
            return Response(inference.thumbnail(state.gallery.image(row)), media_type="image/png")
        except DataError as error:
            raise HTTPException(404, f"{state.gallery.key(row)}: {error}") from None

    return router


def _draw_routes(state: AppState) -> APIRouter:
    """Whether the model draws, with which scales, and drawings."""
    router = APIRouter()
    queue = DrawQueue(state.pipeline)

    @router.get("/about")
    def about() -> dict[str, Any]:
        found = {"version": __version__, "model": state.model, "pictures": len(state.index), "source": state.source}
        if isinstance(state.pipeline, str):
            return {**found, "cannot_draw": state.pipeline}
        scale, cfg_scale = state.pipeline.scales
        has_guide = state.pipeline.guide is not None
        is_conditional = state.pipeline.denoiser.conditioner is not None
        return {**found, "scale": scale if has_guide else None, "cfg_scale": cfg_scale if is_conditional else None}

    @router.post("/draw")
    async def draw(body: DrawBody) -> StreamingResponse:
        return StreamingResponse(queue.draw(body), media_type="application/x-ndjson")

    return router


def _lines(text: str, between: str) -> list[str]:
    found = [line.strip() for line in text.split(between) if line.strip()]
    if not 1 <= len(found) <= MAX_LABELS:
        raise UsageError(f"{len(found)} texts were given; 1 to {MAX_LABELS} are expected")
    if long := next((line for line in found if len(line) > MAX_TEXT), None):
        raise UsageError(f"{long[:40]}... has {len(long)} characters; at most {MAX_TEXT} are taken")
    if twice := [line for line, n in Counter(found).items() if n > 1]:
        raise UsageError(f"{twice[0]!r} is given twice")
    return found
