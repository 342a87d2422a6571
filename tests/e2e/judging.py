"""The responses of a raw client's stream with one watch, as the log that the guarantee checkers read."""

from __future__ import annotations

from coalesce.guarantees.checkers import Bookmark, Canceled, Created, Opened, Received, WatchLog, check
from proxy.measuring.load.judge import change_of, read_truth
from proxy.measuring.load.target import LoadTarget
from tests.e2e.raw_client import WatchStream


def log_of(stream: WatchStream, key: bytes, range_end: bytes = b"", start_revision: int = 0) -> WatchLog:
    """Return the log of the only watch of a stream."""
    log = WatchLog(key, range_end, records=[Opened(start_revision or None)])
    for response in stream.responses:
        if response.created:
            log.records.append(Created(response.header.revision))
        if response.events:
            changes = [change_of(event) for event in response.events]
            log.records.append(Received(response.header.revision, changes, response.fragment))
        elif response.canceled:
            log.records.append(Canceled(response.compact_revision, response.cancel_reason))
        elif not response.created:
            log.records.append(Bookmark(response.header.revision))
    return log


async def assert_kept(
    streams: list[tuple[WatchStream, int]], endpoint: str, prefix: bytes, range_end: bytes, last: int, first: int = 1
) -> None:
    """Check streams, given with their start revisions, that watch [prefix, range_end), against etcd's own history.

    Each must have everything up to the revision `last`; the history is read from `first` on.
    """
    truth = await read_truth(LoadTarget(address=endpoint), prefix, first, last)
    for number, (stream, start_revision) in enumerate(streams):
        log = log_of(stream, prefix, range_end, start_revision)
        assert check(log, truth, last, safe_headers=True) == [], f"stream {number}"
