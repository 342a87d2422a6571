"""The routes that proxies without a server for their watches report."""

from __future__ import annotations

import pytest

from upstream.watch_route import NO_SERVER, PROXIES_MAX, is_loop, parse, refusal, shown, up_to


def test_a_refusal_is_read_back_with_its_route() -> None:
    text = refusal("a1", ("hub:1", "b2", "http+unix:///h", "c3"))
    assert text.startswith(NO_SERVER)
    route = parse(text)
    assert route == ("a1", "hub:1", "b2", "http+unix:///h", "c3")
    assert not is_loop(route)
    assert up_to(route, "b2") == ("a1", "hub:1", "b2")
    assert up_to(route, "d4") == ()
    assert shown("leaf:1", route) == "leaf:1 -> hub:1 -> http+unix:///h"


def test_a_route_ends_at_the_first_proxy_that_comes_again() -> None:
    route = parse(refusal("a1", ("x", "b2", "y", "a1", "x", "b2")))
    assert route == ("a1", "x", "b2", "y", "a1")
    assert is_loop(route)


def test_a_route_has_at_most_proxies_max() -> None:
    onward = [word for number in range(40) for word in ("x", f"{number:x}")]
    assert len(parse(refusal("ff", onward))[::2]) == PROXIES_MAX


@pytest.mark.parametrize("text", ["", NO_SERVER, f"{NO_SERVER}; route: ", "etcdserver: no leader"])
def test_other_texts_have_no_route(text: str) -> None:
    assert parse(text) == ()
