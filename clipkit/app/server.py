"""Serving the page: the socket, the host names it answers to, and uvicorn."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket

import uvicorn

from clipkit.app.guard import is_address
from clipkit.app.routes import LOCAL, make_app
from clipkit.app.state import AppState
from clipkit.errors import UsageError
from clipkit.log import say
from clipkit.malloc import give_back_large_blocks


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at `host` (a name or an address, also of IPv6); port 0 is any free one.

    Raises UsageError for an address that is in use or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or "?", port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"the host {host!r} cannot be resolved: {getattr(error, 'strerror', error)}") from None
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen()
    except OSError as error:
        listening.close()
        other = "host" if error.errno == errno.EADDRNOTAVAIL else "port"
        raise UsageError(f"cannot listen at {host}:{port}: {error.strerror or error}; try another {other}") from None
    return listening


def names_of(host: str) -> frozenset[str]:
    """Host names of requests to a page that listens at `host`."""
    if host.lower() in LOCAL or (is_address(host) and ipaddress.ip_address(host).is_loopback):
        return LOCAL
    machine = socket.gethostname()
    return LOCAL | {name.lower() for name in (host, machine, f"{machine.partition('.')[0]}.local", socket.getfqdn())}


def serve(state: AppState, listening: socket.socket, host: str) -> None:
    """Serve the page at the socket `listening`, opened for `host`, until Ctrl-C."""
    if (names := names_of(host)) != LOCAL:
        say(f"anyone who reaches {host} can use this page: there is no password")
    give_back_large_blocks()
    shown = f"[{host}]" if ":" in host else host
    say(f"http://{shown}:{listening.getsockname()[1]} (Ctrl-C ends it)")
    # uvicorn shuts down on Ctrl-C, then raises the signal again.
    with listening, contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(make_app(state, names), log_level="warning")).run(sockets=[listening])
