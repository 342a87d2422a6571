"""The revision of a read is compared with the revision known when the read began."""

from __future__ import annotations

from collections.abc import Iterator

from proto.scan import Header
from proxy.auth.restore import TRIED_AT_ONCE, RestoreDetector


class FakeWatch:
    """An open watch with the tokens of its clients."""

    key, range_end = b"k", b""

    def __init__(self, *tokens: bytes | None) -> None:
        self._tokens = tokens

    def tokens(self) -> Iterator[bytes | None]:
        yield from self._tokens


def at(revision: int) -> Header:
    return Header.make(1, 2, revision, 3)


def test_only_an_older_linearizable_read_is_a_rollback() -> None:
    rollback = RestoreDetector()
    early = rollback.begin(10)
    assert not rollback.answered(early, at(15), True)
    assert not rollback.answered(rollback.begin(20), at(19), False)
    assert rollback.answered(rollback.begin(20), at(19), True)


def test_reads_begun_before_a_restore_are_ignored() -> None:
    rollback = RestoreDetector()
    first, second, third = (rollback.begin(10) for _ in range(3))
    assert rollback.answered(first, at(5), True)
    # The store continues; a slow answer from before the restore says nothing about it.
    assert not rollback.answered(rollback.begin(5), at(7), True)
    assert not rollback.answered(second, at(5), True)
    assert not rollback.answered(third, at(10), True)
    assert not rollback.answered(rollback.begin(5), at(7), True)
    assert rollback.is_stale(third)


def test_every_token_is_tried_once_until_one_is_answered() -> None:
    rollback = RestoreDetector()
    watches = [FakeWatch(token) for token in (b"a", b"a", b"b")]
    assert rollback.candidate_scopes(None, watches) == []
    rollback.connected()
    assert [asked.token for asked in rollback.candidate_scopes(None, watches)] == [b"a", b"b"]
    assert rollback.candidate_scopes(None, watches) == []
    # The proxy's own user logs in, and a client reconnects with a new token.
    watches.append(FakeWatch(b"c"))
    assert {asked.token for asked in rollback.candidate_scopes(b"own", watches)} == {b"c", b"own"}
    rollback.answered(rollback.begin(10), at(11), True)
    assert not rollback.unproven
    assert rollback.candidate_scopes(b"own", [FakeWatch(b"d")]) == []
    # After the next connection all tokens are tried again.
    rollback.connected()
    assert {asked.token for asked in rollback.candidate_scopes(None, watches)} == {b"a", b"b", b"c"}


def test_a_watch_without_tokens_is_proven_without_a_token() -> None:
    """A cover is never registered with the token of a client."""
    rollback = RestoreDetector()
    rollback.connected()
    assert [asked.token for asked in rollback.candidate_scopes(None, [FakeWatch(), FakeWatch()])] == [None]


def test_few_tokens_are_tried_at_a_time() -> None:
    rollback = RestoreDetector()
    rollback.connected()
    watches = [FakeWatch(b"%d" % number) for number in range(3 * TRIED_AT_ONCE)]
    for _ in range(3):
        assert len(rollback.candidate_scopes(None, watches)) == TRIED_AT_ONCE
    assert rollback.candidate_scopes(None, watches) == []


def test_tried_tokens_are_forgotten_after_a_proof() -> None:
    """The tokens of clients that left long ago are not kept until the next connection."""
    rollback = RestoreDetector()
    rollback.connected()
    assert len(rollback.candidate_scopes(None, [FakeWatch(b"%d" % number) for number in range(5)])) == 5
    assert len(rollback._tried) == 5
    rollback.answered(rollback.begin(10), at(11), False)
    assert rollback.unproven
    assert len(rollback._tried) == 5
    rollback.answered(rollback.begin(10), at(11), True)
    assert not rollback._tried
