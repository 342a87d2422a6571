"""The steps of a watch program, which a player carries out in order, against etcd or through the proxy.

Revisions in a program are relative: 0 is the store's at the start of the program, so its first put is revision 1. So
many programs can share a server, one after the other, and still be compared to the exact revision.

A step that sends a request also waits for its answer, so that the rest is deterministic; `pipelined` does not wait.
Events are waited for by `wait`, since their grouping is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from proto.pb import rpc_pb2

MAIN = "s"
"""The default stream of steps."""

NOPUT = rpc_pb2.WatchCreateRequest.NOPUT
NODELETE = rpc_pb2.WatchCreateRequest.NODELETE
CURRENT = (9, 9, 9)


class Step:
    """One action; `tests.differential.player` carries it out."""


@dataclass(frozen=True)
class Open(Step):
    """Open a stream (others open when first used). Streams named `a:x` and `a:y` share a connection."""

    on: str = MAIN
    has_leader: bool = False
    user: str = ""
    """Sends the token of this user, see `Login`."""
    token: str = ""
    """Sends exactly this token."""
    header: str = "token"
    """The metadata key of the token."""
    window: int = 2**31 - 1
    """The receive window, in bytes."""


@dataclass(frozen=True)
class Create(Step):
    """Create a watch. `start` is relative, None is "now"; `raw_start` is sent unchanged."""

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
    """Cancel a watch. `silent`: there is no answer."""

    id: int = 0
    on: str = MAIN
    silent: bool = False
    pipelined: bool = False


@dataclass(frozen=True)
class Ask(Step):
    """Request progress. `answered`: wait for an answer; `again`: repeat until one has at least this revision."""

    on: str = MAIN
    answered: bool = True
    again: int | None = None


@dataclass(frozen=True)
class Raw(Step):
    """Send bytes as one WatchRequest; there is no answer, unless it `creates`."""

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
    """Do what clientv3 does after a break: resume a watch on a new stream from its last event + 1."""

    watch: int = 0
    """The id on the stream `of`."""
    of: str = MAIN
    on: str = "again"


@dataclass(frozen=True)
class StopReading(Step):
    """Stop sending window updates for the stream."""

    on: str = MAIN


@dataclass(frozen=True)
class ReadOn(Step):
    """Read again."""

    on: str = MAIN


@dataclass(frozen=True)
class Wait(Step):
    """Wait until a stream has received so much since the start of the program."""

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
    """Only through the proxy, which here promises more than etcd."""


@dataclass(frozen=True)
class Put(Step):
    """Put a key, once or `times`, with increasing values; `pipelined`: all at once, with one value."""

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
    """Suspend the other members, and wait until the connected one has noticed that there is no leader."""


@dataclass(frozen=True)
class FindLeader(Step):
    """Resume the other members, and wait for a leader."""


@dataclass(frozen=True)
class Program:
    """One row of the table."""

    name: str
    steps: tuple[Step, ...]
    flags: tuple[str, ...] = ()
    """Flags of this program's etcd."""
    request_bytes_max: int = 2 * 1024 * 1024
    """etcd's --max-request-bytes + 512 KiB: the size of a fragment, and the largest request. The proxy has settings of
    its own for both, which programs that change etcd's change as well."""
    fresh: bool = False
    """Needs a separate etcd, because it restarts it or uses absolute revisions."""
    members: int = 1
    auth: bool = False
    """Needs the users of `stage.USERS`."""
    more_progress: str = ""
    """Why the proxy may answer progress requests that etcd drops."""
    loaded_progress: str = ""
    """Why it depends on timing which progress is answered."""
    from_history: str = ""
    """Why the proxy may still send what etcd has compacted."""
    lonely: bool = False
    """No other client watches its ranges; it would keep in the proxy's history what this program compacts."""
    over_breaks: str = ""
    """Why only each watch's events over all its streams are compared."""
    since: tuple[int, int, int] = (3, 4, 0)
    """Not run on older etcds."""
    limit_s: float = 60.0
    long: bool = False
    """Runs only in `make test-all`, even on the newest etcd."""
    crowd: tuple[tuple[bytes, bytes], ...] = field(default=())
    """Further ranges that other clients watch through the proxy in the crowded run."""

    def ranges(self) -> dict[tuple[bytes, bytes], bool]:
        """Return the ranges of its watches, and whether one of them has prev_kv."""
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
