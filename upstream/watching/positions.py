"""What of a response is new to a watch: the position advances, and what is below it is dropped.

Only whole revisions are passed on, since a watch resumes at a revision. The last revision of a piece of a large
response may continue in the next piece, so it is held back; the whole run, which could be a thousand revisions, is not.
"""

from __future__ import annotations

from proto.scan import WatchResponse
from upstream.watching.effects import HeaderSeen, WatchEffect, WatchReceived
from upstream.watching.stream import HeldRevision, Registration, WatchStream


def pass_on(registration: Registration, response: WatchResponse) -> WatchEffect:
    """Pass on whole revisions, without those that were received before."""
    next_revision = registration.next_revision or 0
    events = response.events
    if events[0].revision < next_revision:
        events = [event for event in events if event.revision >= next_revision]
        response.events = events
        if not events:
            return HeaderSeen(response.header)
    registration.next_revision = events[-1].revision + 1
    return WatchReceived(registration.watch, response)


def pass_on_piece(
    stream: WatchStream, registration: Registration, response: WatchResponse, effects: list[WatchEffect]
) -> int:
    """Pass on the complete revisions of a run of pieces; return the bytes of the one that is held back.

    What is passed on is marked as a fragment while the run continues.
    """
    watch_id = response.watch_id
    events, goes_on = response.events, response.fragment
    held = stream.held.pop(watch_id, None) or HeldRevision()
    whole = len(events)
    while goes_on and whole and events[whole - 1].revision == events[-1].revision:
        whole -= 1
    complete = events[:whole]
    if held.events and (whole or not goes_on or (events and events[0].revision != held.events[-1].revision)):
        complete = held.events + complete
        held = HeldRevision()
    if complete:
        joined = WatchResponse(response.header, watch_id, fragment=goes_on, events=complete)
        effects.append(pass_on(registration, joined))
    if goes_on:
        held.events += events[whole:]
        held.size += sum([len(event.encoded) for event in events[whole:]])
        stream.held[watch_id] = held
    return held.size


def pass_on_bookmark(registration: Registration, response: WatchResponse) -> WatchEffect:
    """Pass on progress under the watch's own id (progress_notify), which every etcd sends in order with events."""
    revision = response.header.revision
    if revision + 1 < (registration.next_revision or 0):
        return HeaderSeen(response.header)
    registration.next_revision = revision + 1
    return WatchReceived(registration.watch, response)
