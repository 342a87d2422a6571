"""Everything that a client can make the core keep counts for a limit, and is freed when its cause has ended."""

from __future__ import annotations

import gc

from coalesce import CoreLimits, Session
from coalesce.batch import Payload
from tests.coalesce.shell import Client, Shell, put

REVISION = 100


def ask(shell: Shell, client: Client, key: bytes) -> None:
    """Let the client create a watch at a compacted revision, and etcd register its range."""
    client.create(key, start=REVISION - 2)
    while shell.core._reads.current is not None:
        shell.read_now(REVISION)
    shell.created(shell.opened[-1], REVISION)


def compacted_watch(shell: Shell, client: Client, key: bytes) -> None:
    """Let a compaction cancel a new watch."""
    ask(shell, client, key)
    shell.canceled(shell.opened[-1], compact_revision=REVISION - 1)


def test_ids_that_a_compaction_cancelled_count_as_watches() -> None:
    """As in etcd, they are kept until the client cancels them: they take memory like watches."""
    shell = Shell(CoreLimits(watches_per_session_max=2, watches_max=3))
    one, two = shell.client(), shell.client()
    for key in (b"a", b"b"):
        compacted_watch(shell, one, key)
    assert one.read()[-1] == "#1 @100 canceled compacted 99"
    assert (shell.core.stats.watches, shell.core.stats.ids_kept) == (0, 2)
    ask(shell, one, b"c")
    refused = "#-1 @100 created canceled (watchmux: the limit of 2 watches of one stream is reached)"
    assert one.read() == [refused]
    # They count for the limit of all sessions, too.
    compacted_watch(shell, two, b"d")
    two.read()
    ask(shell, two, b"e")
    assert two.read() == ["#-1 @100 created canceled (watchmux: the limit of 3 watches is reached)"]
    one.cancel(0)
    assert one.read() == ["#0 @100 canceled"]
    compacted_watch(shell, two, b"e")
    assert two.read()[-1] == "#1 @100 canceled compacted 99"
    one.close()
    two.close()
    assert shell.core.stats.ids_kept == 0


def kept(kind: type) -> int:
    gc.collect()
    return sum(isinstance(each, kind) for each in gc.get_objects())


def test_a_read_does_not_keep_closed_sessions(shell: Shell) -> None:
    """Clients connect, create a watch and leave while etcd does not answer."""
    before = kept(Session)
    for _ in range(20):
        client = shell.client()
        for key in (b"a", b"b", b"c"):
            client.create(key)
        client.close()
        del client
    assert kept(Session) == before
    stays = shell.client()
    stays.create()
    shell.read_now(5)
    shell.read_now(5)
    shell.created(shell.opened[-1], 5)
    assert stays.read() == ["#0 @5 created"]


def test_cached_replays_are_freed_with_the_last_lagging_watch() -> None:
    shell = Shell(CoreLimits(replay_bytes_max=1))
    slow = shell.client()
    trunk = shell.trunk(5, slow)
    slow.stall()
    before = kept(Payload)
    for revision in range(6, 12):
        shell.events(trunk, put(revision, value=bytes(100_000)))
    slow.drain(room=1)
    shell.settle()
    assert slow.unsent
    slow.unsent.clear()
    assert kept(Payload) == before


def test_refused_tokens_are_forgotten_with_the_next_created(shell: Shell) -> None:
    client, other = shell.client(b"bad"), shell.client(b"good")
    trunk = shell.trunk(5, client)
    other.create(start=6)
    source = trunk.owner
    assert trunk.token == b"bad"
    shell.canceled(trunk, reason="rpc error: code = PermissionDenied desc = etcdserver: permission denied")
    assert source.refused_tokens == {b"bad"}
    assert shell.opened[-1].token == b"good"
    shell.created(shell.opened[-1], 6)
    assert source.refused_tokens == set()
