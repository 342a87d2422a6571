"""
A namespace: a prefix that a client's keys have at etcd and that the client does not know of.

What clientv3's namespace package does to a client, said in messages: keys and ranges get the prefix on the way to
etcd, and what comes back loses it. A range to the end of all keys (range_end "\\0") becomes one to the end of the
namespace. An empty key stays empty, so that etcd refuses it in its own words. What etcd tells about keys outside, as
those of a lease, is left out.

Where this differs from clientv3: the end of a namespace is its prefix with the last byte raised and what follows cut
off, so that a prefix that ends in 0xff does not reach into its neighbour's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from proto.pb import kv_pb2, rpc_pb2
from proto.scan import WatchResponse, scan_watch_response

_END: Final = b"\x00"
"""As a range_end: up to the last key there is."""


class Namespace:
    """One prefix, and what it makes of keys, ranges and messages."""

    __slots__ = ("end", "prefix")

    def __init__(self, prefix: bytes) -> None:
        """Take the prefix, which must not be empty."""
        assert prefix
        self.prefix = prefix
        # The first key behind the namespace; "\0" when there is none.
        head = prefix.rstrip(b"\xff")
        self.end = head[:-1] + bytes((head[-1] + 1,)) if head else _END

    def key(self, key: bytes) -> bytes:
        """Return a client's key as etcd knows it; the empty one, which is none, as it is."""
        return self.prefix + key if key else key

    def interval(self, key: bytes, range_end: bytes) -> tuple[bytes, bytes]:
        """Return a client's range as etcd knows it."""
        if not key or not range_end:
            return self.key(key), range_end
        return self.prefix + key, self.end if range_end == _END else self.prefix + range_end

    def has(self, key: bytes) -> bool:
        """Tell whether a key of etcd's is in the namespace."""
        return key.startswith(self.prefix)

    def strip(self, kv: kv_pb2.KeyValue) -> None:
        """Make a key-value of etcd's the client's."""
        kv.key = kv.key.removeprefix(self.prefix)

    def strip_all(self, kvs: Iterable[kv_pb2.KeyValue]) -> None:
        """Do so with several."""
        for kv in kvs:
            kv.key = kv.key.removeprefix(self.prefix)

    def scan(self, data: bytes) -> WatchResponse:
        """
        Read an encoded WatchResponse of etcd's as the clients' own.

        Its events are decoded for that, once for all who will get them. Raises ScanError.
        """
        response = scan_watch_response(data)
        if response.events:
            message = rpc_pb2.WatchResponse.FromString(b"".join([event.encoded for event in response.events]))
            for event in message.events:
                self.strip(event.kv)
                if event.HasField("prev_kv"):
                    self.strip(event.prev_kv)
            response.events = scan_watch_response(message.SerializeToString()).events
        return response
