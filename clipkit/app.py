"""A page on one's own machine that classifies, searches, draws and compares (`clipkit app`, the [app] extra).

Nothing is kept of what is sent. The page is clipkit/assets/app; it talks to what is below /api.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import hashlib
import io
import ipaddress
import json
import random
import socket
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import python_multipart  # noqa: F401 - FastAPI reads forms with it, and says so late
import torch
import uvicorn
from fastapi import APIRouter, FastAPI, File, Form, Request
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image
from pydantic import BaseModel, Field
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from torch import Tensor

from clipkit._version import __version__
from clipkit.data import drawings
from clipkit.data.images import decode
from clipkit.errors import CheckpointError, ClipkitError, DataError, UsageError
from clipkit.guidance.config import SEEDS
from clipkit.guidance.image_grid import grid
from clipkit.guidance.pipeline import Steering, Studio
from clipkit.log import say
from clipkit.malloc import give_back_large_blocks
from clipkit.models.pretrained import Pretrained, fingerprint, load
from clipkit.zeroshot.galleries import Gallery, open_gallery
from clipkit.zeroshot.heads import CACHE, embed_texts
from clipkit.zeroshot.index import Hit, Index, build
from clipkit.zeroshot.similarity import Guess, classify, embed_images, unknown_words

MAX_BYTES = 20_000_000
"""Of one request."""
MAX_BYTES_HELD = 10 * MAX_BYTES
"""Of all requests that are being answered."""
MAX_PIXELS = 16_000_000
"""Of a picture that is sent, when a large JPEG has been reduced: four times a screen."""
MAX_DECODING = 2
"""Pictures that are decoded at the same time."""
MAX_PICTURES = 16
MAX_LABELS = 200
MAX_TEXT = 500
"""Characters of a label, a prompt or a query."""
MAX_STEPS = 100
MAX_WAITING = 4
"""Drawings that wait for their turn; one is made at a time."""
REQUESTS_PER_MINUTE = 240
"""Of one address; a page of search results is some of them."""
LOCAL = frozenset({"localhost"})
"""Names under which everyone reaches this machine, and which nobody else can make point at it."""
_THUMBNAIL = 160
_PAGE = Path(__file__).parent / "assets" / "app"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Text = Annotated[str, Form(min_length=1, max_length=MAX_TEXT)]
Texts = Annotated[str, Form(min_length=1, max_length=MAX_LABELS * MAX_TEXT)]
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

        Raises CheckpointError and DataError as `load` and `open_gallery` do, also when no picture can be read.
        """
        gallery = open_gallery(images or str(_drawings()))
        try:
            studio: Studio | str = Studio.open(model, device)
        except CheckpointError as error:
            studio = f"this model cannot draw: {error}"
        clip = load(model, device) if isinstance(studio, str) else studio.clip
        mark = hashlib.sha256(f"{gallery.source} {gallery.identity()} {fingerprint(clip.model)}".encode()).hexdigest()
        folder = CACHE / "indexes" / mark[:16]
        build(clip, model, gallery, folder)
        index = Index(folder)
        if skipped := index.skipped:
            reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.most_common())
            if not len(index):
                raise DataError(f"none of the {len(gallery)} pictures of {gallery.source} can be read ({reasons})")
            say(f"{skipped.total()} of {len(gallery)} pictures of {gallery.source} are left out ({reasons})")
        if isinstance(studio, str):
            say(studio)
        return cls(model, clip, images or "drawings of our own", gallery, index, studio)


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
    """Refuses other sites' requests, bodies beyond MAX_BYTES, and floods; says what the page may load.

    `names` are those that a request may call this machine by. An address is as good: another site can have its own name
    point here (DNS rebinding), and its scripts then ask under that name, but it cannot have an address as its name.
    """

    def __init__(self, app: ASGIApp, rate: Rate, names: Collection[str]) -> None:
        self.app, self.rate, self.names = app, rate, names
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _POLICY
                headers["Cross-Origin-Resource-Policy"] = "same-origin"
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if refusal := self._refusal(scope):
            return await refusal(scope, receive, guarded)
        length = _length(Headers(scope=scope))
        self._held += length
        try:
            await self.app(scope, receive, guarded)
        finally:
            self._held -= length

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if (named := _host(headers.get("host", ""))) not in self.names and not _is_address(named):
            return _error(400, f"this page is not at {named!r}; open its address, or start it with --host {named}")
        if _is_foreign(headers):
            return _error(403, "another site asked; open the page itself")
        if "transfer-encoding" in headers or not headers.get("content-length", "0").isdecimal():
            return _error(411, "a request must say how long it is")
        if (length := _length(headers)) > MAX_BYTES:
            return _error(413, f"that is {length / 1e6:.1f} MB; at most {MAX_BYTES / 1e6:.0f} are taken")
        if self._held + length > MAX_BYTES_HELD:
            return _later("many pictures are being looked at; try again later", 1)
        who = (scope.get("client") or ("",))[0]
        if scope["path"].startswith("/api/") and (seconds := self.rate.wait(who)):
            return _later(f"too many requests; try again in {seconds:.0f} s", int(seconds) + 1)
        return None


def _length(headers: Headers) -> int:
    """Bytes of a request's body, as it says."""
    return int(headers.get("content-length", "0"))


def _host(address: str) -> str:
    """The name or address in "name:port" and "[address]:port", "" if there is none."""
    try:
        return (urlsplit(f"//{address}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_foreign(headers: Headers) -> bool:
    """Whether another site's page asks. Older browsers send no Sec-Fetch, and no browser does over plain http."""
    if (site := headers.get("sec-fetch-site")) is not None:
        return site not in ("none", "same-origin")
    origin = headers.get("origin")
    return origin is not None and origin.lower().partition("://")[2] != headers.get("host", "").lower()


def _later(message: str, seconds: int) -> JSONResponse:
    refusal = _error(429, message)
    refusal.headers["Retry-After"] = str(seconds)
    return refusal


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
    seed: int = Field(0, ge=0, lt=SEEDS)


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


class Eyes:
    """The CLIP, and pictures that are sent: MAX_DECODING of them are decoded at a time, and none is kept.

    A small file may be many pixels, and a PNG of MAX_PIXELS is 300 MB while it is made opaque.
    """

    def __init__(self, clip: Pretrained) -> None:
        self.clip, self._turns = clip, threading.Semaphore(MAX_DECODING)

    def classify(self, picture: bytes, labels: list[str], template: str) -> list[Guess]:
        """The most probable labels of an encoded image. Raises SampleError, and UsageError as `classify` does."""
        with self._turns:
            return classify(self.clip, [self._decoded(picture)], labels, [template])[0]

    def embed(self, pictures: list[bytes]) -> Tensor:
        """Encoded images -> unit vectors [len(pictures), D]. Raises SampleError."""
        vectors = []
        for picture in pictures:
            with self._turns:
                vectors.append(embed_images(self.clip, [self._decoded(picture)]))
        return torch.cat(vectors)

    def _decoded(self, picture: bytes) -> Image.Image:
        # A JPEG reduced to four times what the model sees is as good as the whole of it.
        return decode(picture, reduce_to=4 * self.clip.model.config.image_size, max_pixels=MAX_PIXELS)

    def thumbnail(self, picture: bytes) -> bytes:
        """An encoded image -> a small PNG of it. Raises SampleError."""
        with self._turns:
            image = decode(picture, reduce_to=_THUMBNAIL)
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()


def make_app(rooms: Rooms, names: Collection[str] = LOCAL) -> FastAPI:
    """The page and what it asks for, for requests that call this machine by its address or one of `names`."""
    complaints = {
        ClipkitError: _complain,
        RequestValidationError: _refuse,
        HTTPException: _explain,
        Exception: _confess,
    }
    app = FastAPI(
        title="clipkit",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        exception_handlers=complaints,  # type: ignore[arg-type]  # each takes its own exception, not any
    )
    app.add_middleware(Guard, rate=Rate(REQUESTS_PER_MINUTE), names=frozenset(map(str.lower, names)))
    eyes = Eyes(rooms.clip)
    for tab in (_looking(eyes), _finding(rooms, eyes), _drawing(rooms)):
        app.include_router(tab, prefix="/api")
    app.mount("/", StaticFiles(directory=_PAGE, html=True))
    return app


async def _complain(_: Request, error: ClipkitError) -> JSONResponse:
    return _error(400, str(error))


async def _refuse(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    message = first["msg"] if first["msg"][1:2].isupper() else first["msg"][:1].lower() + first["msg"][1:]
    return _error(422, f"{first['loc'][-1]}: {message}")


async def _explain(_: Request, error: HTTPException) -> JSONResponse:
    return _error(error.status_code, str(error.detail))


async def _confess(_: Request, error: Exception) -> JSONResponse:
    return _error(500, "that failed; the terminal says why")


def _looking(eyes: Eyes) -> APIRouter:
    """Pictures that are sent, named and compared."""
    tab = APIRouter()

    @tab.post("/classify")
    def say_what(picture: Picture, labels: Texts, template: Text) -> dict[str, Any]:
        names = _lines(labels, ",")
        found = eyes.classify(picture, names, template)
        return {"guesses": [asdict(guess) for guess in found], "unknown_words": unknown_words(eyes.clip, names)}

    @tab.post("/similarity")
    def compare(pictures: Annotated[list[bytes], File()], texts: Texts) -> dict[str, Any]:
        if len(pictures) > MAX_PICTURES:
            raise UsageError(f"{len(pictures)} pictures were sent; at most {MAX_PICTURES} are compared")
        lines = _lines(texts, "\n")
        cosines = embed_texts(eyes.clip.model, eyes.clip.tokenizer, lines) @ eyes.embed(pictures).T
        return {"texts": lines, "cosines": cosines.tolist(), "unknown_words": unknown_words(eyes.clip, lines)}

    return tab


def _finding(rooms: Rooms, eyes: Eyes) -> APIRouter:
    """The gallery: what is like a text or a picture, and small pictures of it."""
    tab = APIRouter()

    @tab.post("/search")
    def find(text: Annotated[str, Form(max_length=MAX_TEXT)] = "", picture: Picture = b"") -> dict[str, Any]:
        if bool(text.strip()) == bool(picture):
            raise UsageError("describe a picture, or give one" + (", not both" if picture else ""))
        query = eyes.embed([picture]) if picture else embed_texts(rooms.clip.model, rooms.clip.tokenizer, [text])
        hits: list[Hit] = rooms.index.search(query, k=24)[0]
        return {"hits": [asdict(hit) for hit in hits], "unknown_words": unknown_words(rooms.clip, [text])}

    @tab.get("/some/{n}")
    def some(n: Annotated[int, PathParameter(ge=1, le=MAX_PICTURES)]) -> dict[str, list[int]]:
        return {"rows": random.sample(rooms.index.rows, min(n, len(rooms.index)))}

    @tab.get("/picture/{row}")
    def picture_of(row: int) -> Response:
        if not 0 <= row < len(rooms.gallery):
            raise HTTPException(404, f"there is no picture {row}")
        try:
            return Response(eyes.thumbnail(rooms.gallery.image(row)), media_type="image/png")
        except DataError as error:
            raise HTTPException(404, f"{rooms.gallery.key(row)}: {error}") from None

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
    if long := next((line for line in found if len(line) > MAX_TEXT), None):
        raise UsageError(f"{long[:40]}... has {len(long)} characters; at most {MAX_TEXT} are taken")
    if twice := [line for line, n in Counter(found).items() if n > 1]:
        raise UsageError(f"{twice[0]!r} is given twice")
    return found


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at `host` (a name or an address, also of IPv6); port 0 is any that is free.

    Raises UsageError for an address that cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or "?", port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host!r} cannot be resolved: {getattr(error, 'strerror', error)}") from None
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        other = "--host" if error.errno == errno.EADDRNOTAVAIL else "--port"
        raise UsageError(f"cannot listen at {host}:{port}: {error.strerror or error}; try another {other}") from None
    return listening


def names_of(host: str) -> frozenset[str]:
    """Names under which a page that listens at `host` may be asked for."""
    if host.lower() in LOCAL or (_is_address(host) and ipaddress.ip_address(host).is_loopback):
        return LOCAL
    machine = socket.gethostname()
    return LOCAL | {name.lower() for name in (host, machine, f"{machine.partition('.')[0]}.local", socket.getfqdn())}


def serve(rooms: Rooms, listening: socket.socket, host: str) -> None:
    """Answer at `listening`, which listens at `host`, until Ctrl-C."""
    if (names := names_of(host)) != LOCAL:
        say(f"whoever reaches {host} can use this page: there is no password")
    give_back_large_blocks()
    shown = f"[{host}]" if ":" in host else host
    say(f"http://{shown}:{listening.getsockname()[1]} (Ctrl-C ends it)")
    # uvicorn ends well on Ctrl-C, then sends the signal again.
    with listening, contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(make_app(rooms, names), log_level="warning")).run(sockets=[listening])
