"""What a watch program is made of: steps that a player carries out, in order, against etcd or through the proxy.

Revisions in a program are relative: 0 is the store's when the program began, so its first put is revision 1. That is
what lets many programs share a server, one after the other, and yet be compared to the revision.

A step that asks for something also waits for its answer, so that what follows is decided by etcd and not by chance;
`pipelined` asks on without waiting. Events are waited for by `wait`, since how they are grouped is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from proto.pb import rpc_pb2

MAIN = "s"
"""The stream of steps that name none."""

NOPUT = rpc_pb2.WatchCreateRequest.NOPUT
NODELETE = rpc_pb2.WatchCreateRequest.NODELETE
CURRENT = (9, 9, 9)


class Step:
    """One thing to do; `tests.differential.player` knows how."""


@dataclass(frozen=True)
class Open(Step):
    """Open a stream (others open when first used). Streams named `a:x` and `a:y` share a connection."""

    on: str = MAIN
    has_leader: bool = False
    user: str = ""
    """Sends the token of this user, see `Login`."""
    token: str = ""
    """Sends this very token."""
    header: str = "token"
    """The metadata key the token travels under."""
    window: int = 2**31 - 1
    """What may be received unacknowledged, in bytes."""


@dataclass(frozen=True)
class Create(Step):
    """Ask for a watch. `start` is relative, None is "now"; `raw_start` is sent as it is."""

    key: bytes = b"k"
    end: bytes = b""
    start: int | None = None
    raw_start: int = 0
    id: int = 0
    filters: tuple[int, ...] = ()
    prev_kv: bool = False
    fragment: bool = False
    progress_notify: bool = False
    on: str = MAIN
    pipelined: bool = False


@dataclass(frozen=True)
class Cancel(Step):
    """Cancel a watch. `silent`: nobody answers."""

    id: int = 0
    on: str = MAIN
    silent: bool = False
    pipelined: bool = False


@dataclass(frozen=True)
class Ask(Step):
    """Ask for progress. `answered`: wait for an answer; `again`: ask until there is one of at least this revision."""

    on: str = MAIN
    answered: bool = True
    again: int | None = None


@dataclass(frozen=True)
class Raw(Step):
    """Send bytes as one WatchRequest; nobody answers, unless it `creates`."""

    message: bytes = b""
    on: str = MAIN
    creates: bool = False
    """It is a create after all, and answered."""


@dataclass(frozen=True)
class HalfClose(Step):
    """End the sending side of a stream."""

    on: str = MAIN


@dataclass(frozen=True)
class CancelStream(Step):
    """Cancel the stream, as a client library does."""

    on: str = MAIN


@dataclass(frozen=True)
class Disconnect(Step):
    """Drop the connection of a stream."""

    on: str = MAIN


@dataclass(frozen=True)
class Resume(Step):
    """Do what clientv3 does after a break: on a new stream, take a watch up again from its last event + 1."""

    watch: int = 0
    """The id on the stream `of`."""
    of: str = MAIN
    on: str = "again"


@dataclass(frozen=True)
class StopReading(Step):
    """Stop giving the stream's window back."""

    on: str = MAIN


@dataclass(frozen=True)
class ReadOn(Step):
    """Read on."""

    on: str = MAIN


@dataclass(frozen=True)
class Wait(Step):
    """Wait until a stream has brought so much since the program began."""

    on: str = MAIN
    controls: int = 0
    """Answers to creates and cancels."""
    events: int = 0
    compacted: int = 0
    """Cancels by compaction of distinct ids."""
    progress: int = 0
    """Distinct revisions of progress answers."""
    notified: int | None = None
    """A progress_notify of at least this revision."""
    end: bool = False
    """The end of the stream."""
    better: bool = False
    """Only through the proxy: here it promises more than etcd."""


@dataclass(frozen=True)
class Put(Step):
    """Put a key, once or `times`, the value counting up; `pipelined`: all at once, of one value."""

    key: bytes = b"k"
    value: bytes = b"v"
    times: int = 1
    lease: int = 0
    user: str = ""
    pipelined: bool = False


@dataclass(frozen=True)
class Delete(Step):
    """Delete a key or a range."""

    key: bytes = b"k"
    end: bytes = b""


@dataclass(frozen=True)
class Txn(Step):
    """One transaction of puts and deletes (value None), all in one revision."""

    writes: Sequence[tuple[bytes, bytes | None]]


@dataclass(frozen=True)
class Compact(Step):
    """Compact at a relative revision."""

    at: int


@dataclass(frozen=True)
class Grant(Step):
    """Grant a lease under a chosen id."""

    id: int


@dataclass(frozen=True)
class Revoke(Step):
    """Revoke a lease."""

    id: int


@dataclass(frozen=True)
class Login(Step):
    """Fetch a token for a user, whose password is its name."""

    user: str


@dataclass(frozen=True)
class Ctl(Step):
    """Run etcdctl against etcd itself, as root if auth is on."""

    arguments: tuple[str, ...]
    root: bool = False


@dataclass(frozen=True)
class Restart(Step):
    """Stop etcd and start it again; `kill`: as a crash would; `flags`: with these further ones from now on."""

    kill: bool = False
    flags: tuple[str, ...] | None = None


@dataclass(frozen=True)
class LoseLeader(Step):
    """Stop the other members, and wait until the one we talk to knows of no leader."""


@dataclass(frozen=True)
class FindLeader(Step):
    """Let the other members go on, and wait for a leader."""


@dataclass(frozen=True)
class Program:
    """One row of the table."""

    name: str
    steps: tuple[Step, ...]
    flags: tuple[str, ...] = ()
    """Given to the etcd of this program."""
    fragment_bytes: int = 2 * 1024 * 1024
    """The proxy's own knob, for programs that change etcd's by --max-request-bytes."""
    fresh: bool = False
    """Wants an etcd of its own: it restarts it, or needs absolute revisions."""
    members: int = 1
    auth: bool = False
    """Wants the users of `stage.USERS`."""
    more_progress: str = ""
    """Why the proxy may answer progress requests that etcd drops."""
    loaded_progress: str = ""
    """Why it depends on the moment which progress is answered."""
    from_history: str = ""
    """Why the proxy may still bring what etcd has compacted."""
    lonely: bool = False
    """Nobody else watches its ranges, who would keep in the proxy's history what this program compacts."""
    over_breaks: str = ""
    """Why only what each watch got over all its streams is compared."""
    since: tuple[int, int, int] = (3, 4, 0)
    """Older etcds are not asked."""
    limit_s: float = 60.0
    long: bool = False
    """Belongs to `make test-all` even on the newest etcd."""
    crowd: tuple[tuple[bytes, bytes], ...] = field(default=())
    """Further ranges that others watch through the proxy in the crowded run."""

    def ranges(self) -> dict[tuple[bytes, bytes], bool]:
        """Return the ranges its watches ask for, and whether one of them asks for prev_kv."""
        found = dict.fromkeys(self.crowd, False)
        for step in self.steps:
            if isinstance(step, Create):
                found[step.key, step.end] = found.get((step.key, step.end), False) or step.prev_kv
        return found


def txn_request(writes: Sequence[tuple[bytes, bytes | None]]) -> rpc_pb2.TxnRequest:
    """Build the transaction of a `Txn` step."""
    request = rpc_pb2.TxnRequest()
    for key, value in writes:
        if value is None:
            request.success.add(request_delete_range=rpc_pb2.DeleteRangeRequest(key=key))
        else:
            request.success.add(request_put=rpc_pb2.PutRequest(key=key, value=value))
    return request
