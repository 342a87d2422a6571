"""From a create to a watch: ids, refusals and their order, "now", and the order of answers."""

from __future__ import annotations

from itertools import pairwise

import pytest

from coalesce import CoreLimits, CreateRefusal, Granted, Send
from tests.coalesce.shell import Client, Shell, header, put

COMPACTED = "etcdserver: mvcc: required revision has been compacted"
DENIED = "rpc error: code = PermissionDenied desc = etcdserver: permission denied"
EMPTY = "mvcc: watcher range is empty"
DUPLICATE = "mvcc: duplicate watch ID provided on the WatchStream"


# ids


@pytest.mark.parametrize(
    ("script", "answers"),
    [
        ("create create create", ["#0 created", "#1 created", "#2 created"]),
        ("create cancel:0 create", ["#0 created", "#0 canceled", "#1 created"]),
        ("create:1 create create", ["#1 created", "#0 created", "#2 created"]),
        ("create:5 cancel:5 create:5", ["#5 created", "#5 canceled", "#5 created"]),
        ("create:-7 create:-1", ["#-7 created", "#-1 created"]),
        ("create:3 create:3", ["#3 created", f"#-1 created canceled ({DUPLICATE})"]),
        ("create create:0 create:1", ["#0 created", "#1 created", f"#-1 created canceled ({DUPLICATE})"]),
        ("cancel:0 cancel:9", []),
        ("create:2 create create create", ["#2 created", "#0 created", "#1 created", "#3 created"]),
    ],
)
def test_ids(script: str, answers: list[str], shell: Shell) -> None:
    shell.trunk(5, shell.client())
    client = shell.client()
    for word in script.split():
        what, _, watch_id = word.partition(":")
        if what == "create":
            client.create(start=6, watch_id=int(watch_id or 0))
        else:
            client.cancel(int(watch_id))
    assert [line.replace(" @5", "") for line in client.read()] == answers


def test_a_compacted_id_stays_taken_until_the_client_cancels(shell: Shell, client: Client) -> None:
    trunk = shell.trunk(5, client)
    client.create(start=3, watch_id=7)
    shell.created(shell.opened[-1], 5)
    shell.canceled(shell.opened[-1], compact_revision=4, at=5)
    assert client.read() == ["#7 @5 created", "#7 @5 canceled compacted 4"]
    client.create(start=6, watch_id=7)
    assert client.read() == [f"#-1 @5 created canceled ({DUPLICATE})"]
    client.cancel(7)
    client.cancel(7)
    client.create(start=6, watch_id=7)
    assert client.read() == ["#7 @5 canceled", "#7 @5 created"]
    shell.events(trunk, put(6))
    assert client.read() == ["#0 @6 put 6 k=v", "#7 @6 put 6 k=v"]


# refusals


@pytest.mark.parametrize(
    ("start", "denied", "empty", "duplicate", "reason"),
    [
        (-1, True, True, True, COMPACTED),
        (-1, False, False, False, COMPACTED),
        (6, True, True, True, DENIED),
        (6, False, True, True, EMPTY),
        (6, False, False, True, DUPLICATE),
        (None, True, False, True, DENIED),
        (None, False, True, False, EMPTY),
    ],
)
def test_the_order_of_refusals(start: int | None, denied: bool, empty: bool, duplicate: bool, reason: str) -> None:
    shell = Shell()
    client = shell.client()
    shell.trunk(5, client, watch_id=7)
    shell.auth = True
    client.create(b"k", b"a" if empty else b"", start, watch_id=7 if duplicate else 8)
    for check in shell.checks:
        shell.do(shell.core.permission, check, CreateRefusal(DENIED) if denied else None)
    while shell.reads:
        shell.read_now(5)
    assert client.read() == [f"#-1 @5 created canceled ({reason})"]
    assert len(shell.opened) == 1


def test_a_duplicate_id_is_refused_last_and_alone(shell: Shell, client: Client) -> None:
    shell.trunk(5, client)
    client.create(start=6, watch_id=4)
    client.create(b"k", b"a", 6, watch_id=4)
    client.create(start=6, watch_id=4)
    client.create(start=6, watch_id=8)
    assert client.read() == [
        "#4 @5 created",
        f"#-1 @5 created canceled ({EMPTY})",
        f"#-1 @5 created canceled ({DUPLICATE})",
        "#8 @5 created",
    ]


@pytest.mark.parametrize(
    ("key", "range_end", "refused"),
    [
        (b"k", b"", False),
        (b"k", b"\x00", False),
        (b"", b"\x00", False),
        (b"", b"", False),
        (b"k", b"k", True),
        (b"k", b"j", True),
        (b"k", b"k\x00", False),
        (b"\x00", b"\x00", False),
    ],
)
def test_empty_ranges(key: bytes, range_end: bytes, refused: bool, shell: Shell) -> None:
    shell.trunk(5, shell.client())
    client = shell.client()
    client.create(key, range_end)
    if refused:
        shell.read_now(6)
        assert client.read() == [f"#-1 @6 created canceled ({EMPTY})"]
        assert shell.reads == []
        return
    shell.read_now(5)
    if not shell.opened[-1].created:
        shell.created(shell.opened[-1], 5)
    assert client.read() == ["#0 @5 created"]


def test_an_empty_key_is_the_smallest_key(shell: Shell, client: Client) -> None:
    client.create(b"", b"")
    assert (shell.opened[0].key, shell.opened[0].range_end) == (b"\x00", b"")


def test_the_first_refusal_reads_a_header(shell: Shell, client: Client) -> None:
    client.create(start=-1)
    assert client.read() == []
    shell.read_now(12)
    assert client.read() == [f"#-1 @12 created canceled ({COMPACTED})"]
    client.create(start=-5)
    assert client.read() == [f"#-1 @12 created canceled ({COMPACTED})"]


def test_the_refusal_of_an_empty_range_is_as_new_as_now(shell: Shell, client: Client) -> None:
    """Another proxy takes it as the store's revision after its own request."""
    shell.trunk(5, client)
    client.create(b"k", b"k")
    client.progress()
    client.create(b"k", b"k", 5)
    assert client.read() == []
    shell.read_now(9)
    assert client.read() == [f"#-1 @9 created canceled ({EMPTY})", f"#-1 @9 created canceled ({EMPTY})"]


def test_a_denied_empty_range_is_refused_as_new_as_now(shell: Shell, client: Client) -> None:
    """The user of another proxy's stream may not be allowed to read the key that this proxy asks with."""
    shell.trunk(5, client)
    shell.auth = True
    client.create(b"k", b"k")
    shell.do(shell.core.permission, shell.checks.pop(), CreateRefusal("denied"))
    client.create(b"k")
    shell.do(shell.core.permission, shell.checks.pop(), CreateRefusal("denied"))
    assert client.read() == []
    shell.read_now(9)
    assert client.read() == ["#-1 @9 created canceled (denied)"] * 2


def test_limits_are_refused_with_a_clear_text() -> None:
    shell = Shell(CoreLimits(watches_per_session_max=2, watches_max=3, trunks_max=2))
    one, two = shell.client(), shell.client()
    shell.trunk(5, one)
    shell.trunk(5, one, b"j")
    one.create(start=6)
    assert one.read() == ["#-1 @5 created canceled (watchmux: the limit of 2 watches of one stream is reached)"]
    two.create(b"other", start=6)
    assert two.read() == ["#-1 @5 created canceled (watchmux: the limit of 2 different ranges is reached)"]
    two.create(start=6)
    two.create(start=6)
    assert two.read() == [
        "#0 @5 created",
        "#-1 @5 created canceled (watchmux: the limit of 3 watches is reached)",
    ]
    one.cancel(0)
    two.create(start=6)
    assert two.read() == ["#1 @5 created"]


def test_too_many_queued_requests_end_the_session() -> None:
    shell = Shell(CoreLimits(queue_max=3))
    client = shell.client()
    for _ in range(3):
        client.create()
    assert client.ended is None
    client.create()
    assert client.ended == (8, "watchmux: more than 3 requests wait on one watch stream")
    shell.read_now(5)
    shell.created(shell.opened[0], 5)
    assert client.read() == []


# now


def test_now_is_read_after_the_request_arrived(shell: Shell) -> None:
    """One read serves the creates that waited when it began; later ones wait for the next."""
    early, late, later = shell.client(), shell.client(), shell.client()
    early.create()
    late.create()
    later.create()
    assert len(shell.reads) == 1
    shell.created(shell.opened[0], 5)
    shell.read_now(5)
    assert early.read() == ["#0 @5 created"]
    assert late.read() == []
    assert len(shell.reads) == 1
    shell.read_now(7)
    assert late.read() == ["#0 @7 created"]
    assert later.read() == ["#0 @7 created"]
    assert shell.reads == []
    assert len(shell.opened) == 1


def test_events_up_to_the_read_are_skipped(shell: Shell) -> None:
    first, second = shell.client(), shell.client()
    trunk = shell.trunk(5, first)
    second.create()
    shell.read_now(8)
    assert second.read() == ["#0 @8 created"]
    shell.events(trunk, put(7), put(8), put(9))
    assert second.read() == ["#0 @9 put 9 k=v"]
    assert first.read() == ["#0 @9 put 7 k=v put 8 k=v put 9 k=v"]


def test_events_between_the_read_and_the_trunk_are_replayed(shell: Shell) -> None:
    first, second = shell.client(), shell.client()
    trunk = shell.trunk(5, first)
    second.create()
    shell.events(trunk, put(6))
    shell.events(trunk, put(7))
    shell.read_now(6)
    assert second.read() == ["#0 @6 created", "#0 @7 put 7 k=v"]
    shell.events(trunk, put(8))
    assert second.read() == ["#0 @8 put 8 k=v"]


def test_events_before_the_trunks_created_are_before_now(shell: Shell, client: Client) -> None:
    """etcd reads the header of `created` after it registered the watch: events at or below it may be incomplete."""
    client.create()
    shell.read_now(4)
    shell.created(shell.opened[0], 6)
    assert client.read() == ["#0 @6 created"]
    shell.events(shell.opened[0], put(6))
    assert client.read() == []
    shell.events(shell.opened[0], put(7))
    assert client.read() == ["#0 @7 put 7 k=v"]


def test_created_does_not_filter_a_trunk_with_a_start(shell: Shell, client: Client) -> None:
    client.create(start=4)
    shell.read_now(6)
    assert shell.opened[0].start_revision == 4
    shell.created(shell.opened[0], 6)
    shell.events(shell.opened[0], put(4), put(6), at=6)
    assert client.read() == ["#0 @6 created", "#0 @6 put 4 k=v put 6 k=v"]


@pytest.mark.parametrize(
    ("start", "newest", "trunk_start"),
    [(101, 100, 101), (100, 100, 100), (90, 100, 90), (89, 100, None), (1, 100, None), (5000, 100, 101)],
)
def test_where_a_trunk_starts(start: int, newest: int, trunk_start: int | None) -> None:
    shell = Shell(CoreLimits(trunk_catch_up_revisions=10))
    client = shell.client()
    client.create(start=start)
    shell.read_now(newest)
    assert [upstream.start_revision for upstream in shell.opened] == [trunk_start]
    shell.created(shell.opened[0], newest)
    assert client.read() == [f"#0 @{newest} created"]
    # A watch that starts further back comes through a backfill, so that no later watch waits for it.
    assert [upstream.start_revision for upstream in shell.opened[1:]] == ([] if trunk_start else [start])


def test_a_start_needs_no_read_after_a_recent_header(shell: Shell) -> None:
    shell.trunk(100, shell.client(), b"other")
    client = shell.client()
    client.create(start=95)
    assert shell.reads == []
    trunk = shell.opened[-1]
    assert (trunk.key, trunk.start_revision) == (b"k", 95)
    assert client.read() == ["#0 @100 created"]
    shell.created(trunk, 103)
    assert client.read() == []
    # "Now" is read nevertheless.
    client.create(b"j")
    shell.created(shell.opened[-1], 103)
    assert client.read() == []
    shell.read_now(104)
    assert client.read() == ["#1 @104 created"]
    # With an outdated header the trunk of a future start would begin in the past, where a compaction can cancel it.
    client.create(b"i", start=106)
    shell.read_now(105)
    assert shell.opened[-1].start_revision == 106
    shell.wait(0.25)
    client.create(b"h", start=95)
    assert len(shell.reads) == 1


def test_a_future_start_gets_no_earlier_event(shell: Shell, client: Client) -> None:
    trunk = shell.trunk(5, shell.client())
    client.create(start=8)
    assert client.read() == ["#0 @5 created"]
    shell.events(trunk, put(6))
    shell.events(trunk, put(7), put(8))
    shell.events(trunk, put(9))
    assert client.read() == ["#0 @8 put 8 k=v", "#0 @9 put 9 k=v"]
    assert len(shell.opened) == 1
    assert shell.core.stats.joins_future == 1


def test_a_start_inside_the_history_needs_no_upstream_call(shell: Shell) -> None:
    trunk = shell.trunk(5, shell.client())
    for revision in range(6, 12):
        shell.events(trunk, put(revision))
    client = shell.client()
    client.create(start=9)
    assert client.read() == ["#0 @11 created", "#0 @11 put 9 k=v put 10 k=v put 11 k=v"]
    assert len(shell.opened) == 1
    assert shell.reads == []
    assert shell.core.stats.joins_history == 1


def test_a_permission_check_serves_as_the_read(shell: Shell) -> None:
    shell.auth = True
    client = shell.client(b"token")
    client.create()
    (check,) = shell.checks
    assert (check.session.identity.token, check.key, check.range_end) == (b"token", b"k", b"")
    shell.do(shell.core.permission, check, Granted(header(5)))
    assert shell.reads == []
    assert shell.opened[0].token == b"token"
    shell.created(shell.opened[0], 5)
    assert client.read() == ["#0 @5 created"]


@pytest.mark.parametrize("outcome", [None, header(3)])
def test_an_earlier_header_does_not_replace_the_read(outcome: object, shell: Shell) -> None:
    shell.auth = True
    client = shell.client()
    client.create()
    shell.do(shell.core.permission, shell.checks[0], outcome)
    shell.created(shell.opened[0], 4)
    assert client.read() == []
    shell.read_now(9)
    assert client.read() == ["#0 @9 created"]


# order


def test_answers_are_in_the_order_of_the_requests(shell: Shell) -> None:
    """A create that waits delays only later requests of its client."""
    shell.auth = True
    client, other = shell.client(), shell.client()
    for who, start in ((other, 6), (client, 6)):
        who.create(start=start)
    shell.do(shell.core.permission, shell.checks.pop(0), None)
    shell.read_now(5)
    shell.created(shell.opened[0], 5)
    shell.do(shell.core.permission, shell.checks.pop(0), None)
    assert client.read() == ["#0 @5 created"]
    client.create(start=6)
    client.create(start=-1)
    client.cancel(0)
    client.progress()
    client.create(start=6)
    slow, quick = shell.checks
    shell.do(shell.core.permission, quick, None)
    shell.events(shell.opened[0], put(6))
    assert client.read() == ["#0 @6 put 6 k=v"]
    shell.do(shell.core.permission, slow, None)
    assert client.read() == [
        "#1 @6 created",
        f"#-1 @6 created canceled ({COMPACTED})",
        "#0 @6 canceled",
        "#2 @6 created",
        "#1 @6 put 6 k=v",
        "#2 @6 put 6 k=v",
    ]


def test_cancelled_before_created_is_created_and_then_canceled(shell: Shell, client: Client) -> None:
    client.create()
    client.cancel(0)
    shell.created(shell.opened[0], 5)
    shell.events(shell.opened[0], put(6))
    assert client.read() == []
    shell.read_now(5)
    assert client.read() == ["#0 @5 created", "#0 @6 canceled"]


def test_queued_creates_wait_concurrently(shell: Shell, client: Client) -> None:
    """Each range's trunk opens when its create arrives, not when its turn comes."""
    for key in (b"a", b"b", b"c"):
        client.create(key)
    assert [upstream.key for upstream in shell.opened] == [b"a", b"b", b"c"]
    for upstream in reversed(shell.opened):
        shell.created(upstream, 5)
    assert client.read() == []
    shell.read_now(5)
    shell.read_now(5)
    assert client.read() == ["#0 @5 created", "#1 @5 created", "#2 @5 created"]


def test_a_session_closed_while_waiting_leaves_nothing(shell: Shell, client: Client) -> None:
    client.create()
    client.create()
    client.close()
    shell.read_now(5)
    shell.created(shell.opened[0], 5)
    shell.wait(10)
    assert client.read() == []
    assert shell.closed == shell.opened
    assert shell.core.stats.trunks == 0
    # Answers that arrive for it later are ignored.
    client.create()
    client.cancel(0)
    client.progress()
    client.close()


def test_one_upstream_watch_for_many(shell: Shell) -> None:
    clients = [shell.client() for _ in range(50)]
    for client in clients:
        client.create()
    shell.created(shell.opened[0], 5)
    shell.read_now(5)
    shell.read_now(5)
    assert len(shell.opened) == 1
    shell.deliveries = 0
    shell.events(shell.opened[0], put(6))
    assert shell.deliveries == 1
    assert all(client.read() == ["#0 @5 created", "#0 @6 put 6 k=v"] for client in clients)


# much at once


def test_many_creates_are_decided_in_steps() -> None:
    """One read serves all of them; ten are decided in a step, and the order on each stream is kept."""
    shell = Shell(CoreLimits(step_watches_max=10))
    clients = [shell.client() for _ in range(3)]
    for _ in range(20):
        for client in clients:
            client.create()
    shell.created(shell.opened[0], 5)
    shell.read_now(5)
    answered = [sum(len(client.lines) for client in clients)]
    shell.read_now(5)
    answered.append(sum(len(client.lines) for client in clients))
    while shell.core.next_deadline() == shell.now:
        shell.do(shell.core.expire)
        answered.append(sum(len(client.lines) for client in clients))
    assert answered[-1] == 60
    steps = [after - before for before, after in pairwise([0, *answered])]
    assert max(steps) <= 10
    for client in clients:
        assert client.read() == [f"#{number} @5 created" for number in range(20)]


def test_answers_that_follow_each_other_are_one_effect(shell: Shell) -> None:
    """Creates of two clients that arrive in turn are decided client by client."""
    shell.trunk(5, shell.client())
    one, other = shell.client(), shell.client()
    for _ in range(3):
        one.create()
        other.create()
    # The first create began a read of its own.
    shell.read_now(6)
    assert one.read() == ["#0 @6 created"]
    effects = shell.core.revision_read(shell.reads.pop(), header(6), shell.now)
    sent = [(effect.session, len(effect.messages)) for effect in effects if isinstance(effect, Send)]
    assert sent == [(other.session, 3), (one.session, 2)]
    assert len(effects) == 2


def test_a_later_read_does_not_overtake_an_earlier_queue() -> None:
    """The rest of a step is queued: answers keep their order, and a cancel follows its create."""
    shell = Shell(CoreLimits(step_watches_max=2))
    client = shell.client()
    for number in range(1, 6):
        client.create(watch_id=number)
        client.cancel(number)
    shell.created(shell.opened[0], 5)
    shell.read_now(5)
    shell.read_now(6)
    shell.settle()
    lines = [line.replace(" @5", "").replace(" @6", "") for line in client.read()]
    assert lines == [f"#{number} {what}" for number in range(1, 6) for what in ("created", "canceled")]
    assert shell.core.stats.line_bytes == 0


def test_unused_reads_are_repeated_after_a_restore() -> None:
    shell = Shell(CoreLimits(step_watches_max=1))
    clients = [shell.client() for _ in range(3)]
    shell.trunk(5, shell.client())
    for client in clients:
        client.create()
    # The first create began a read of its own; the second read is for the others, of which a step decides one.
    shell.read_now(9)
    shell.read_now(9)
    *decided, client = clients
    assert [each.read() for each in decided] == [["#0 @9 created"]] * 2
    shell.do(shell.core.other_history, header(3))
    shell.settle()
    shell.created(shell.opened[-1], 3)
    assert client.read() == []
    while shell.reads:
        shell.read_now(3)
    shell.settle()
    assert client.read() == ["#0 @3 created"]


def test_a_full_queue_takes_no_more_requests() -> None:
    """The bound is memory, not requests; the queue is full at the bound, and released at half of it."""
    shell = Shell(CoreLimits(line_bytes_max=4 * (512 + 100)))
    client = shell.client()
    for number in range(4):
        assert not client.session.line_full
        client.create(b"k" * 100)
        assert shell.core.stats.line_bytes == (number + 1) * 612
    assert client.session.line_full
    while shell.reads:
        shell.read_now(5)
    assert not client.may_ask
    shell.created(shell.opened[0], 5)
    assert client.may_ask
    assert (client.session.line_full, client.session.line_bytes, shell.core.stats.line_bytes) == (False, 0, 0)


def test_a_full_queue_ends_with_its_session() -> None:
    shell = Shell(CoreLimits(line_bytes_max=600))
    client = shell.client()
    for _ in range(3):
        client.create()
    assert client.session.line_full
    client.close()
    assert shell.core.stats.line_bytes == 0
    assert shell.core.next_deadline() is not None
    shell.wait(60)
    assert not client.may_ask
