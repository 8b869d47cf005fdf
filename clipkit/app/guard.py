"""Middleware against other sites' requests, large bodies and floods; it also sets the security headers."""

from __future__ import annotations

import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipkit.app import limits

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Rate:
    """Rate limit by address, a token bucket: `per_minute` requests at once, refilled in a minute."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self._clock = per_minute, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, who: str) -> float:
        """Take a token -> 0, or the seconds until there is one."""
        now = self._clock()
        left, since = self._buckets.pop(who, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - since) * self.per_minute / 60)
        allowed = left >= 1
        self._buckets[who] = (left - allowed, now)
        if len(self._buckets) > 10_000:
            self._buckets.popitem(last=False)
        return 0.0 if allowed else (1 - left) * 60 / self.per_minute


class Guard:
    """ASGI middleware: refuses other sites' requests, bodies beyond MAX_BYTES and floods, and sets security headers.

    `names` are the host names that a request may have. Addresses are allowed too: a site that points its own name here
    (DNS rebinding) sends requests with that name, and cannot use an address as its name.
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
        if (named := _host(headers.get("host", ""))) not in self.names and not is_address(named):
            return error_response(400, f"this page is not at {named!r}; open its address, or let it listen at {named}")
        if _is_foreign(headers):
            return error_response(403, "another site asked; open the page itself")
        if "transfer-encoding" in headers or not headers.get("content-length", "0").isdecimal():
            return error_response(411, "a request must say how long it is")
        if (length := _length(headers)) > limits.MAX_BYTES:
            return error_response(413, f"that is {length / 1e6:.1f} MB; at most {limits.MAX_BYTES / 1e6:.0f} are taken")
        if self._held + length > limits.MAX_BYTES_HELD:
            return _later("many pictures are in work; try again later", 1)
        who = (scope.get("client") or ("",))[0]
        if scope["path"].startswith("/api/") and (seconds := self.rate.wait(who)):
            return _later(f"too many requests; try again in {seconds:.0f} s", int(seconds) + 1)
        return None


def _length(headers: Headers) -> int:
    """Content length of a request."""
    return int(headers.get("content-length", "0"))


def _host(address: str) -> str:
    """The name or address in "name:port" and "[address]:port", "" if there is none."""
    try:
        return (urlsplit(f"//{address}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def is_address(host: str) -> bool:
    """Whether a host is an IP address, not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_foreign(headers: Headers) -> bool:
    """Whether another site's page sent the request. Older browsers send no Sec-Fetch, nor does any over plain http."""
    if (site := headers.get("sec-fetch-site")) is not None:
        return site not in ("none", "same-origin")
    origin = headers.get("origin")
    return origin is not None and origin.lower().partition("://")[2] != headers.get("host", "").lower()


def _later(message: str, seconds: int) -> JSONResponse:
    refusal = error_response(429, message)
    refusal.headers["Retry-After"] = str(seconds)
    return refusal


def error_response(status: int, message: str) -> JSONResponse:
    """An error as the page shows it."""
    return JSONResponse({"error": message}, status)
