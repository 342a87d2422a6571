"""Where the watches and calls of proxies lead: a proxy that finds its own id at the end of a route is in a loop.

A proxy asks each endpoint with its id for the status of the server that watches there are at (WATCH_ROUTE), or that
calls reach (CALL_ROUTE). An answer that comes from the proxy itself shows a loop: so it is found before the endpoint is
used. Proxies that take their watches from each other may all have no server. Each of them therefore adds to its
refusal its id and the way it tries itself, as far as it knows it from such refusals. So a proxy that is in a loop finds
its own id in an answer after as many attempts as the loop has proxies, without any call that goes round.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from upstream.errors import Unreachable

WATCH_ROUTE: Final = b"watchmux-watch-route"
"""Metadata of Maintenance.Status from a proxy to its --watch-endpoints: a proxy there passes the call to the server
that its own watches are at. The value is the id of the proxy that the call comes from, which finds a loop by it."""

CALL_ROUTE: Final = b"watchmux-call-route"
"""The same from a proxy to its --endpoints: a proxy there passes the call on like all others. The value is the id that
all processes of --workers share: the call may come back to any of them."""

NO_SERVER: Final = "watchmux: there is no server for watches now"

PROXIES_MAX: Final = 16
"""A route is followed through this many proxies; with --workers each level of proxies is two of them."""

_ROUTE: Final = re.compile(rf"{NO_SERVER}; route: ([0-9a-f]+(?: \S+ [0-9a-f]+)*)")

Route = tuple[str, ...]
"""Ids of proxies, and between two of them the address by which the first one uses the second."""


class LoopOfProxies(Unreachable):
    """An endpoint leads to a proxy that the route has passed."""

    def __init__(self, where: str, what: str, to_do: str, route: Route) -> None:
        super().__init__(where, what, to_do)
        self.route = route


class RouteIds(NamedTuple):
    """The ids by which a proxy finds itself at the end of a route; "" for a client that is not a proxy."""

    # Of this process, for its watches; of the hub of --workers the same as `calls`.
    watches: str = ""
    # Of the whole proxy.
    calls: str = ""

    def metadata(self, are_proxies: bool) -> tuple[tuple[bytes, bytes], ...]:
        """Return the metadata with which an endpoint is asked; `are_proxies`: it is one of --watch-endpoints."""
        own = self.own(are_proxies).encode()
        return ((WATCH_ROUTE if are_proxies else CALL_ROUTE, own),) if own else ()

    def own(self, are_proxies: bool) -> str:
        """Return the id that a route from such an endpoint must not lead to."""
        return self.watches if are_proxies else self.calls


def new_id() -> str:
    """Return a new id for a proxy."""
    return os.urandom(8).hex()


def refusal(own_id: str, onward: Sequence[str] = ()) -> str:
    """Return the text by which a proxy refuses its status; `onward`: an address, and the route from there on."""
    return f"{NO_SERVER}; route: {' '.join((own_id, *onward))}"


def parse(text: str) -> Route:
    """Return the route in a refusal, up to the first proxy that is in it twice; () if it has none."""
    found = _ROUTE.match(text)
    words = tuple(found[1].split()) if found else ()
    ids = words[::2]
    repeated = next((place for place, each in enumerate(ids) if each in ids[:place]), PROXIES_MAX - 1)
    return words[: 2 * repeated + 1]


def up_to(route: Route, own_id: str) -> Route:
    """Return the part of a route that leads to a proxy; () if it does not."""
    ids = route[::2]
    return route[: 2 * ids.index(own_id) + 1] if own_id in ids else ()


def is_loop(route: Route) -> bool:
    """Whether a route ends at a proxy that it has passed."""
    return bool(route) and route[-1] in route[:-1:2]


def shown(first: str, route: Route) -> str:
    """Return the addresses of a route for people; `first`: the address of its first proxy."""
    return " -> ".join((first, *route[1::2]))


def unusable(where: str, route: Route, own_id: str, are_proxies: bool) -> Unreachable:
    """Return why the endpoint `where`, which has answered with a route, cannot be used; LoopOfProxies in a loop."""
    if own := up_to(route, own_id):
        what = f"lead back to this proxy, in a loop: {shown(where, own)}"
    elif is_loop(route):
        what = f"lead in a loop: {shown(where, route)}"
    elif are_proxies:
        return Unreachable(where, "it has no server for its watches", "check its log")
    else:
        return Unreachable(where, "it is a proxy that has no etcd", "check its log")
    subject, flags = ("watches", "--watch-endpoints and --endpoints") if are_proxies else ("calls", "--endpoints")
    return LoopOfProxies(where, f"its {subject} {what}", f"check {flags} of these proxies", own or route)
