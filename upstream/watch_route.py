"""Where the watches of proxies lead: each proxy that has no server for its watches says which way it tries.

A proxy with --watch-endpoints asks each of them with its id (WATCH_ROUTE) for the status of the server that the watches
there are at. Proxies that take their watches from each other all have no server. Each of them therefore adds to its
refusal its id and the way it tries itself, as far as it knows it from such refusals. So a proxy that is in a loop finds
its own id in an answer after as many attempts as the loop has proxies, without any call that goes round.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

WATCH_ROUTE: Final = b"watchmux-watch-route"
"""Metadata of Maintenance.Status from a proxy to its --watch-endpoints: a proxy there passes the call to the server
that its own watches are at. The value is the id of the proxy that the call comes from, which finds a loop by it."""

NO_SERVER: Final = "watchmux: there is no server for watches now"

PROXIES_MAX: Final = 16
"""A route is followed through this many proxies; with --workers each level of proxies is two of them."""

_ROUTE: Final = re.compile(rf"{NO_SERVER}; route: ([0-9a-f]+(?: \S+ [0-9a-f]+)*)")

Route = tuple[str, ...]
"""Ids of proxies, and between two of them the address by which the first one uses the second."""


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
