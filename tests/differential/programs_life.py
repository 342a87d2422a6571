"""Programs about events in the life of etcd: restarts, lost leaders, and users with their tokens."""

from __future__ import annotations

from tests.differential.steps import (
    Cancel,
    Compact,
    Create,
    Ctl,
    Delete,
    FindLeader,
    Login,
    LoseLeader,
    Open,
    Program,
    Put,
    Restart,
    Resume,
    Wait,
)

SURVIVES = "etcd's streams end with it; the proxy's go on"
A_RANGE = (b"a/", b"a0")
"""The range that alice may read, besides k; bob may read neither."""
ROOT_STREAM = Open("root", user="root")

PROGRAMS = (
    # restarts
    Program(
        "etcd restarts",
        (Create(), Put(times=2), Wait(events=2), Restart(), Resume(), Put(times=2), Wait(events=4)),
        fresh=True,
        over_breaks=SURVIVES,
    ),
    Program(
        "etcd is killed, twice",
        (
            *(Create(b"k", b"l", prev_kv=True), Put(times=2), Wait(events=2), Restart(kill=True), Resume()),
            *(
                Put(times=2),
                Delete(),
                Wait(events=5),
                Restart(kill=True),
                Resume(of="again", on="third"),
                Put(),
                Wait(events=6),
            ),
        ),
        fresh=True,
        over_breaks=SURVIVES,
    ),
    Program(
        "etcd restarts and is compacted",
        (
            *(Create(), Create(b"quiet", on="quiet"), Put(times=5), Wait(events=5), Restart(kill=True), Compact(5)),
            *(
                Resume(),
                Resume(of="quiet", on="loud"),
                Put(),
                Put(b"quiet"),
                Wait(events=6),
                Wait("quiet", compacted=1),
            ),
        ),
        fresh=True,
        over_breaks=SURVIVES,
        from_history="the trunk may have resumed before the compaction; a client of etcd comes after it",
    ),
    # leaders
    Program(
        "no leader, with hasleader",
        (
            *(Open(has_leader=True), Create(), Put(), Wait(events=1), LoseLeader(), Wait(end=True)),
            FindLeader(),
        ),
        members=2,
        fresh=True,
    ),
    Program(
        "no leader, without hasleader",
        (Create(), Put(), Wait(events=1), LoseLeader(), FindLeader(), Put(), Wait(events=2)),
        members=2,
        fresh=True,
    ),
    # users
    Program(
        "a user watches what it may",
        (Login("alice"), Open(user="alice"), Create(), Create(*A_RANGE), Put(), Put(b"a/1"), Wait(events=2)),
        auth=True,
    ),
    Program(
        "the token in the header authorization",
        (Login("alice"), Open(user="alice", header="authorization"), Create(), Put(), Wait(events=1)),
        auth=True,
    ),
    Program("a user may not", (Login("bob"), Open(user="bob"), Create(), Create(*A_RANGE), Put()), auth=True),
    Program(
        "a user may only part of it",
        (
            Login("alice"),
            Open(user="alice"),
            Create(b"a", b"a0"),
            Create(b"a/", b"b"),
            Create(b"a/1", b"a/5"),
            Create(b"l"),
            Create(),
            Put(b"a/2"),
            Wait(events=1),
        ),
        auth=True,
    ),
    Program("no token", (Open(), Create(), Create(*A_RANGE), Put()), auth=True),
    Program("a token that never was", (Open(token="nonsense.1"), Create(), Put()), auth=True),
    Program(
        "root watches everything",
        (ROOT_STREAM, Create(b"", b"\x00", on="root"), Put(), Wait("root", events=1)),
        auth=True,
    ),
    Program(
        "users side by side on one range",
        (
            *(
                Login("alice"),
                Login("bob"),
                Open("alice", user="alice"),
                Open("bob", user="bob"),
                ROOT_STREAM,
                Open("none"),
            ),
            *(Create(on=name) for name in ("root", "bob", "alice", "none", "alice")),
            *(
                Put(times=2),
                Wait("root", events=2),
                Wait("alice", events=4),
                Cancel(0, on="root"),
                Put(),
                Wait("alice", events=6),
            ),
        ),
        auth=True,
    ),
    Program(
        "the order of refusals for a user",
        (
            *(Login("bob"), Login("alice"), Open(user="bob"), Open("alice", user="alice"), Open("none")),
            *(Create(raw_start=-1), Create(b"b", b"a"), Create(b"b", b"a", raw_start=-1), Create(on="alice", id=4)),
            *(Create(on="alice", id=4, key=b"l"), Create(on="alice", id=4), Create(b"a/5", b"a/1", on="alice")),
            *(Create(b"b", b"a", on="none"), Create(raw_start=-1, on="none"), Put(), Wait("alice", events=1)),
        ),
        auth=True,
    ),
    Program(
        "a past start of a user",
        (Login("alice"), Open(user="alice"), Put(times=3), Create(start=1), Wait(events=3), Put(), Wait(events=4)),
        auth=True,
    ),
    Program(
        "a user who may not, of the past",
        (Login("bob"), Open(user="bob"), Put(times=3), Create(start=1), Create(start=90)),
        auth=True,
    ),
    Program(
        "a permission is granted and taken away",
        (
            *(Login("bob"), Open(user="bob"), Create(b"p"), Put(b"p")),
            *(
                Ctl(("role", "grant-permission", "fence", "read", "p"), root=True),
                Login("bob"),
                Open("b", user="bob"),
                Create(b"p", on="b"),
            ),
            *(
                Put(b"p"),
                Wait("b", events=1),
                Ctl(("role", "revoke-permission", "fence", "p"), root=True),
                Login("bob"),
            ),
            *(Open("c", user="bob"), Create(b"p", on="c"), Put(b"p"), Wait("b", events=2)),
        ),
        auth=True,
    ),
)
