"""What the answers to the proxy's progress requests prove.

An answer to a manual request proves nothing about a watch whose `created` arrived after the request was sent, and does
not say which request it answers; etcd drops requests that it does not answer. `WatchStream` keeps a lower bound for the
number of the request that an answer can belong to: answers arrive in order, and an answer with a revision above that of
a later create's header cannot belong to a request sent before that create.

The listener needs at least the revision that the server had at the time of the request, and a lower bound that lags
after a dropped request would never confirm it. So a request that follows unanswered ones is sent with a *probe*: a
create of an empty range, which every etcd refuses, in order and with its current revision. Any proof of that revision,
an event or an answer to any request, is fresh enough. Servers without ordered progress get only the probe. This is
decided per stream, by the member that serves it: a stream stays at its member when the connection rotates.

A proxy as the server (--workers, --watch-endpoints) answers a request as soon as it can, which may be after the answers
to later creates, and with a higher revision. It answers for all watches of the stream, but only a probe shows how new
the answer is. So there each request is sent with one.

Sources: etcd server/etcdserver/api/v3rpc/watch.go.
"""

from __future__ import annotations

from typing import Final

from proto.plain_request import PROGRESS, encode_create
from proto.scan import Header
from upstream.watching.effects import HeaderSeen, Progressed, WatchEffect, WriteMessage
from upstream.watching.stream import OpenedWatch, SentCreate, WatchStream

_PROBE: Final = encode_create(b"\x01", b"\x01")


def ask_progress(stream: WatchStream, number: int, effects: list[WatchEffect], *, late: bool) -> None:
    """Request progress on a stream; `number` is the listener's number for this request.

    `late`: the server may answer after the answers to later creates.
    """
    if stream.live and not stream.paused:
        if late or stream.answers_from <= stream.requested or not stream.ordered:
            send_probe(stream, number, effects)
        if not stream.ordered:
            return
        stream.requested += 1
        if not late:
            stream.numbers.append((stream.requested, number))
        effects.append(WriteMessage(stream, PROGRESS))


def send_probe(stream: WatchStream, number: int, effects: list[WatchEffect]) -> None:
    """Request the server's current revision, in order with the other requests of a stream."""
    stream.creating.append(SentCreate(None, stream.requested, number))
    effects.append(WriteMessage(stream, _PROBE))


def note_created(stream: WatchStream, create: SentCreate, revision: int) -> None:
    """Record that a create was answered while the store was at a revision."""
    before = create.requested_before
    if before >= stream.answers_from and (not stream.passed or stream.passed[-1][0] < before):
        stream.passed.append((before, revision))


def progress_answered(stream: WatchStream, header: Header, effects: list[WatchEffect]) -> None:
    """Handle an answer to one of the stream's progress requests."""
    revision = header.revision
    if stream.answers_from > stream.requested:
        # All requests have been answered: this answer proves nothing.
        effects.append(HeaderSeen(header))
        return
    while stream.passed and stream.passed[0][1] < revision:
        number, _ = stream.passed.popleft()
        stream.answers_from = max(stream.answers_from, number + 1)
    asked = 0
    while stream.numbers and stream.numbers[0][0] <= stream.answers_from:
        asked = stream.numbers.popleft()[1]
    watches: list[OpenedWatch] = []
    for registration in stream.by_id.values():
        if registration.unproven < stream.answers_from:
            if revision >= (registration.next_revision or 0):
                registration.next_revision = revision + 1
            watches.append(registration.watch)
    stream.answers_from += 1
    while stream.passed and stream.passed[0][0] < stream.answers_from:
        stream.passed.popleft()
    effects.append(Progressed(watches, header, asked) if watches or asked else HeaderSeen(header))
