"""A page on one's own machine that classifies, searches, draws and compares (`clipkit app`, the [app] extra).

Nothing is kept of what is sent. The page is clipkit/data/app; it talks to what is below /api.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import python_multipart  # noqa: F401 - FastAPI reads forms with it, and says so late
import torch
import uvicorn
from fastapi import APIRouter, FastAPI, File, Form, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from clipkit import drawings
from clipkit._version import __version__
from clipkit.errors import CheckpointError, ClipkitError, DataError, UsageError
from clipkit.guidance.draw import Steering, Studio
from clipkit.guidance.sheet import grid
from clipkit.images import decode
from clipkit.pretrained import Pretrained, fingerprint, load
from clipkit.records import say
from clipkit.zeroshot.galleries import Gallery, open_gallery
from clipkit.zeroshot.heads import CACHE, embed_texts
from clipkit.zeroshot.index import Hit, Index, build
from clipkit.zeroshot.similarity import classify, embed_images

MAX_BYTES = 20_000_000
"""Of one request."""
MAX_PICTURES = 16
MAX_LABELS = 200
MAX_TEXT = 500
MAX_STEPS = 100
MAX_WAITING = 4
"""Drawings that wait for their turn; one is made at a time."""
REQUESTS_PER_MINUTE = 240
"""Of one address; a page of search results is some of them."""
LOCAL = ("localhost", "127.0.0.1")
_THUMBNAIL = 160
_PAGE = Path(__file__).parent / "data" / "app"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Text = Annotated[str, Form(min_length=1, max_length=MAX_TEXT)]
Picture = Annotated[bytes, File()]


@dataclass(frozen=True)
class Rooms:
    """What the page can do: a CLIP, an indexed gallery, and a studio (or why there is none)."""

    model: str
    clip: Pretrained
    source: str
    """Where the gallery's pictures are from, in words."""
    gallery: Gallery
    index: Index
    studio: Studio | str

    @classmethod
    def open(cls, model: str, images: str | None = None, device: str = "auto") -> Rooms:
        """Load `model` and index the folder or pack `images` (without one: drawings), unless that was done before.

        Raises CheckpointError and DataError as `load` and `open_gallery` do.
        """
        try:
            studio: Studio | str = Studio.open(model, device)
        except CheckpointError as error:
            studio = f"this model cannot draw: {error}"
        clip = load(model, device) if isinstance(studio, str) else studio.clip
        gallery = open_gallery(images or str(_drawings()))
        mark = hashlib.sha256(f"{gallery.source} {gallery.identity()} {fingerprint(clip.model)}".encode()).hexdigest()
        folder = CACHE / "indexes" / mark[:16]
        build(clip, model, gallery, folder)
        return cls(model, clip, images or "drawings of our own", gallery, Index(folder), studio)


def _drawings() -> Path:
    """A folder with a drawing of each object in each colour, made when it is first wanted."""
    folder = CACHE / "drawings"
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("val", "heldout"):
        for i, (object_, colour) in enumerate(drawings.SPLITS[split]):
            file = folder / f"{colour} {object_}.png"
            if not file.is_file():
                drawings.draw(split, 0, i, size=96).image.save(file)
    return folder


class Rate:
    """A bucket of requests for each address: `per_minute` of them at once, and as many again each minute."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, who: str) -> float:
        """Take one; seconds until there is one if there is none."""
        now = self._clock()
        left, since = self._buckets.pop(who, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - since) * self.per_minute / 60)
        allowed = left >= 1
        self._buckets[who] = (left - allowed, now)
        if len(self._buckets) > 10_000:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - left) * 60 / self.per_minute


class Guard:
    """Refuses other sites' requests, bodies beyond MAX_BYTES, and floods; says what the page may load."""

    def __init__(self, app: ASGIApp, rate: Rate) -> None:
        self.app, self.rate = app, rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            return _error(403, "another site asked; open the page itself")
        if not scope["path"].startswith("/api/"):
            return None
        length = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not length.isdigit():
            return _error(411, "a request must say how long it is")
        if int(length) > MAX_BYTES:
            return _error(413, f"that is {int(length) / 1e6:.1f} MB; at most {MAX_BYTES / 1e6:.0f} are taken")
        if seconds := self.rate.wait((scope.get("client") or ("",))[0]):
            refusal = _error(429, f"too many requests; try again in {seconds:.0f} s")
            refusal.headers["Retry-After"] = str(int(seconds) + 1)
            return refusal
        return None


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)


class Wanted(BaseModel):
    """What is to be drawn."""

    prompt: str = Field(min_length=1, max_length=MAX_TEXT)
    negative: str = Field("", max_length=MAX_TEXT)
    n: int = Field(8, ge=1, le=MAX_PICTURES)
    steps: int = Field(25, ge=1, le=MAX_STEPS)
    scale: float | None = Field(None, ge=0, le=100)
    cfg_scale: float | None = Field(None, ge=0, le=100)
    seed: int = Field(0, ge=0, lt=2**53)


class Easel:
    """Draws one wish at a time; further ones wait, but not many."""

    def __init__(self, studio: Studio | str) -> None:
        self.studio, self._turn, self._present = studio, threading.Lock(), 0

    def draw(self, wanted: Wanted) -> AsyncIterator[str]:
        """Each step's pictures, and at last the pictures with their scores, a line of JSON each.

        Ends early when nobody listens. Raises UsageError when this model cannot draw, HTTPException if too many wait.
        """
        if isinstance(self.studio, str):
            raise UsageError(self.studio)
        if self._present > MAX_WAITING:
            raise HTTPException(429, f"{MAX_WAITING} drawings are waiting already; try again later")
        return self._events(self.studio, wanted)

    async def _events(self, studio: Studio, wanted: Wanted) -> AsyncIterator[str]:
        loop, heard, left = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any]](), threading.Event()
        self._present += 1

        def tell(event: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, event)

        work = loop.run_in_executor(None, self._work, studio, wanted, tell, left)
        work.add_done_callback(lambda _: self._gone())
        try:
            while True:
                event = await heard.get()
                yield json.dumps(event) + "\n"
                if "step" not in event:
                    return
        finally:
            left.set()

    def _gone(self) -> None:
        self._present -= 1

    def _work(
        self, studio: Studio, wanted: Wanted, tell: Callable[[dict[str, Any]], None], left: threading.Event
    ) -> None:
        done = 0

        def watch(pictures: Tensor) -> None:
            nonlocal done
            done += 1
            if left.is_set():
                raise _LeftError
            tell({"step": done, "of": wanted.steps, "picture": _data_url(pictures)})

        try:
            with self._turn:
                drawn = studio.draw(
                    wanted.prompt,
                    n=wanted.n,
                    steps=wanted.steps,
                    scale=wanted.scale,
                    negative=[wanted.negative] if wanted.negative else [],
                    seed=wanted.seed,
                    steering=Steering(wanted.cfg_scale),
                    watch=watch,
                )
            tell({"picture": _data_url(drawn.images), "scores": drawn.scores, "about": drawn.about})
        except _LeftError:
            return
        except ClipkitError as error:
            tell({"error": str(error)})
        except Exception:
            tell({"error": "the drawing failed; the terminal says why"})
            raise


class _LeftError(Exception):
    """Nobody listens any more."""


def _data_url(pictures: Tensor) -> str:
    buffer = io.BytesIO()
    grid(pictures).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def make_app(rooms: Rooms, hosts: Sequence[str] = LOCAL) -> FastAPI:
    """The page and what it asks for, for requests that name one of `hosts` ("*": any)."""
    complaints = {ClipkitError: _complain, RequestValidationError: _refuse, HTTPException: _explain}
    app = FastAPI(
        title="clipkit",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        exception_handlers=complaints,  # type: ignore[arg-type]  # each takes its own exception, not any
    )
    app.add_middleware(Guard, rate=Rate(REQUESTS_PER_MINUTE))
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    for tab in (_looking(rooms.clip), _finding(rooms), _drawing(rooms)):
        app.include_router(tab, prefix="/api")
    app.mount("/", StaticFiles(directory=_PAGE, html=True))
    return app


async def _complain(_: Request, error: ClipkitError) -> JSONResponse:
    return _error(400, str(error))


async def _refuse(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    return _error(422, f"{first['loc'][-1]}: {first['msg'][:1].lower()}{first['msg'][1:]}")


async def _explain(_: Request, error: HTTPException) -> JSONResponse:
    return _error(error.status_code, str(error.detail))


def _looking(clip: Pretrained) -> APIRouter:
    """Pictures that are sent, named and compared."""
    tab = APIRouter()

    @tab.post("/classify")
    def say_what(picture: Picture, labels: Text, template: Text) -> dict[str, Any]:
        found = classify(clip, [decode(picture)], _lines(labels, ","), [template])[0]
        return {"guesses": [asdict(guess) for guess in found]}

    @tab.post("/similarity")
    def compare(pictures: Annotated[list[bytes], File()], texts: Text) -> dict[str, Any]:
        if len(pictures) > MAX_PICTURES:
            raise UsageError(f"{len(pictures)} pictures were sent; at most {MAX_PICTURES} are compared")
        lines = _lines(texts, "\n")
        # One at a time: a small file may be many pixels.
        images = torch.cat([embed_images(clip, [decode(picture)]) for picture in pictures])
        cosines = embed_texts(clip.model, clip.tokenizer, lines) @ images.T
        return {"texts": lines, "cosines": cosines.tolist()}

    return tab


def _finding(rooms: Rooms) -> APIRouter:
    """The gallery: what is like a text or a picture, and small pictures of it."""
    tab = APIRouter()

    @tab.post("/search")
    def find(text: Annotated[str, Form(max_length=MAX_TEXT)] = "", picture: Picture = b"") -> dict[str, Any]:
        if not text.strip() and not picture:
            raise UsageError("describe a picture, or give one")
        if picture:
            query = embed_images(rooms.clip, [decode(picture)])
        else:
            query = embed_texts(rooms.clip.model, rooms.clip.tokenizer, [text])
        hits: list[Hit] = rooms.index.search(query, k=24)[0]
        return {"hits": [asdict(hit) for hit in hits]}

    @tab.get("/picture/{row}")
    def picture_of(row: int) -> Response:
        if not 0 <= row < len(rooms.gallery):
            raise HTTPException(404, f"there is no picture {row}")
        try:
            image = decode(rooms.gallery.image(row))
        except DataError as error:
            raise HTTPException(404, f"{rooms.gallery.key(row)}: {error}") from None
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return Response(buffer.getvalue(), media_type="image/png")

    return tab


def _drawing(rooms: Rooms) -> APIRouter:
    """Whether and how the model draws, and its drawing."""
    tab, easel = APIRouter(), Easel(rooms.studio)

    @tab.get("/about")
    def about() -> dict[str, Any]:
        found = {"version": __version__, "model": rooms.model, "pictures": len(rooms.index), "source": rooms.source}
        if isinstance(rooms.studio, str):
            return {**found, "cannot_draw": rooms.studio}
        scale, cfg_scale = rooms.studio.scales
        has_guide, is_told = rooms.studio.guide is not None, rooms.studio.denoiser.conditioner is not None
        return {**found, "scale": scale if has_guide else None, "cfg_scale": cfg_scale if is_told else None}

    @tab.post("/draw")
    async def draw(wanted: Wanted) -> StreamingResponse:
        return StreamingResponse(easel.draw(wanted), media_type="application/x-ndjson")

    return tab


def _lines(text: str, between: str) -> list[str]:
    found = [line.strip() for line in text.split(between) if line.strip()]
    if not 1 <= len(found) <= MAX_LABELS:
        raise UsageError(f"{len(found)} texts were given; 1 to {MAX_LABELS} are due")
    return found


def serve(rooms: Rooms, host: str, port: int) -> None:
    """Answer until Ctrl-C; port 0 is any that is free. Raises UsageError for an address that cannot be had."""
    listening = socket.socket(socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise UsageError(f"cannot listen at {host}:{port}: {error.strerror or error}; try another --port") from None
    if host not in LOCAL:
        say(f"whoever reaches {host} can use this page: there is no password")
    app = make_app(rooms, LOCAL if host in LOCAL else ("*",))
    say(f"http://{host}:{listening.getsockname()[1]} (Ctrl-C ends it)")
    # uvicorn ends well on Ctrl-C, then sends the signal again.
    with listening, contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
