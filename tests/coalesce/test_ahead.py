"""Watches that wait for a later revision."""

from __future__ import annotations

from coalesce.ahead import AheadWatches


def test_watches_arrive_in_the_order_of_positions() -> None:
    ahead: AheadWatches[str] = AheadWatches()
    for name, position in (("c", 9), ("a", 7), ("d", 9), ("b", 8)):
        ahead.add(name, position)
    ahead.remove("b", 8)
    assert ahead.first == 7
    assert list(ahead.take_first()) == ["a"]
    # Nothing is left at 8.
    assert not ahead.take_first()
    assert list(ahead.take_first()) == ["c", "d"]
    assert not ahead


def test_positions_without_watches_do_not_accumulate() -> None:
    ahead: AheadWatches[str] = AheadWatches()
    ahead.add("first", 1)
    for position in range(2, 1000):
        ahead.add("later", position)
        ahead.remove("later", position)
    assert len(ahead._positions) <= 2 * 1 + 17
    assert list(ahead.take_first()) == ["first"]
