"""The lists of groups: which are kept, and that all of them together are bounded."""

from __future__ import annotations

from typing import Any, cast

import pytest

from coalesce import listing
from coalesce.listing import LISTED_MIN, GroupLists
from coalesce.model import Group
from tests.coalesce.shell import Client, Shell, put


def _group(size: int) -> Group:
    group = Group(0)
    for _ in range(size):
        group.add(cast(Any, object()))
    return group


def test_the_list_of_a_large_group_is_kept_until_it_changes() -> None:
    lists, group = GroupLists(), _group(LISTED_MIN)
    listed = lists.of(group)
    assert listed == tuple(group.members)
    assert lists.of(group) is listed
    group.add(cast(Any, object()))
    assert len(lists.of(group)) == LISTED_MIN + 1
    assert lists.watches == LISTED_MIN + 1
    group.remove(listed[0])
    assert lists.of(group) == tuple(group.members)


def test_the_list_of_a_small_group_is_not_kept() -> None:
    lists, group = GroupLists(), _group(LISTED_MIN - 1)
    assert lists.of(group) == tuple(group.members)
    assert (group.listed, lists.watches) == (None, 0)


@pytest.mark.parametrize("more", [0, 1])
def test_the_lists_that_are_kept_are_bounded_together(monkeypatch: pytest.MonkeyPatch, more: int) -> None:
    monkeypatch.setattr(listing, "LISTED_WATCHES_MAX", 3 * LISTED_MIN)
    lists = GroupLists()
    groups = [_group(LISTED_MIN), _group(LISTED_MIN), _group(LISTED_MIN + more)]
    for group in groups:
        lists.of(group)
    assert [group.listed is not None for group in groups] == [more == 0, True, True]
    # A list that was dropped is made again, and is the newest then.
    lists.of(groups[0])
    assert groups[0].listed is not None
    assert lists.watches <= 3 * LISTED_MIN


def test_a_group_larger_than_the_bound_has_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "LISTED_WATCHES_MAX", LISTED_MIN)
    lists, small, large = GroupLists(), _group(LISTED_MIN), _group(3 * LISTED_MIN)
    lists.of(small)
    lists.of(large)
    assert (small.listed, large.listed) == (None, tuple(large.members))


def test_groups_that_end_take_their_watches_from_the_lists(shell: Shell, client: Client) -> None:
    trunk = shell.trunk(5, client)
    for _ in range(LISTED_MIN):
        client.create(start=6)
    shell.events(trunk, put(6))
    (group,) = trunk.owner.groups.values()
    assert group.listed is not None
    client.close()
    shell.settle()
    assert not group.listed
    assert not group.members
    assert (shell.core._state.lists.sizes, shell.core._state.lists.watches) == ({}, 0)
