"""
What answers to our requests for progress prove.

An answer to a manual request says nothing about a watch whose `created` came after the request was sent, and does not
say which request it answers; unanswered ones are dropped by etcd. `WatchStream` keeps a lower bound for the number of
the request that an answer can belong to: answers come in order, and an answer with a revision above that of a later
create's header cannot belong to a request sent before that create.

Who asks wants to be told at least what the server had when it asked, and a lower bound that lags behind after a
dropped request would never say so. So a request that follows unanswered ones goes with a *probe*: a create of an
empty range, which every etcd refuses, in order and with the revision it has then. Whatever proves that revision, an
event or an answer to whichever request, is fresh enough. Servers without ordered progress get the probe alone: each
stream goes by the member that it is at, since streams stay where they are when their connection rotates.

Sources: etcd server/etcdserver/api/v3rpc/watch.go.
"""

from __future__ import annotations

from typing import Final

from proto.scan import Header, encode_create, encode_progress
from upstream.watching.effects import HeaderSeen, Progressed, WatchEffect, Write
from upstream.watching.stream import Create, OpenedWatch, WatchStream

_PROBE: Final = encode_create(b"\x01", b"\x01")


def ask_progress(stream: WatchStream, number: int, effects: list[WatchEffect]) -> None:
    """Ask how far a stream is complete; `number` is the listener's for this request."""
    if stream.live and not stream.paused:
        if stream.answers_from <= stream.requested or not stream.ordered:
            send_probe(stream, number, effects)
        if not stream.ordered:
            return
        stream.requested += 1
        stream.numbers.append((stream.requested, number))
        effects.append(Write(stream, encode_progress()))


def send_probe(stream: WatchStream, number: int, effects: list[WatchEffect]) -> None:
    """Ask for the revision that the server has, in order with the other requests of a stream."""
    stream.creating.append(Create(None, stream.requested, number))
    effects.append(Write(stream, _PROBE))


def note_created(stream: WatchStream, create: Create, revision: int) -> None:
    """Take note that a create was answered when the store had a revision."""
    before = create.requested_before
    if before >= stream.answers_from and (not stream.passed or stream.passed[-1][0] < before):
        stream.passed.append((before, revision))


def progress_answered(stream: WatchStream, header: Header, effects: list[WatchEffect]) -> None:
    """An answer to one of our progress requests came."""
    revision = header.revision
    if stream.answers_from > stream.requested:
        # All have been answered: whatever this is, it proves nothing.
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
