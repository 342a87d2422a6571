"""A namespace: a prefix that a client's keys have at etcd and that the client does not see.

It does with messages what clientv3's namespace package does in a client: keys and ranges get the prefix on the way to
etcd, and lose it on the way back. A range to the end of all keys (range_end "\\0") becomes one to the end of the
namespace. An empty key stays empty, so that etcd refuses it with its own error. Keys outside of the namespace in an
answer, such as those of a lease, are left out.

One difference from clientv3: the end of a namespace is its prefix without trailing 0xff bytes and with the last byte
incremented, so that a prefix that ends in 0xff does not include keys of the next namespace.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from proto.scan import WatchResponse, scan_watch_response
from proto.spans import FROM_KEY, prefix_end

if TYPE_CHECKING:
    from proto.pb import kv_pb2


class Namespace:
    """One prefix, and the translation of keys, ranges and messages."""

    def __init__(self, prefix: bytes) -> None:
        """`prefix` must not be empty."""
        assert prefix
        self.prefix = prefix
        # The first key after the namespace; "\0" when there is none.
        self.end = prefix_end(prefix)
        from proto.pb import rpc_pb2  # loads protobuf, so only with a namespace

        self._message = rpc_pb2.WatchResponse

    def key(self, key: bytes) -> bytes:
        """Return a client's key as it is at etcd; an empty key stays empty."""
        return self.prefix + key if key else key

    def interval(self, key: bytes, range_end: bytes) -> tuple[bytes, bytes]:
        """Return a client's range as it is at etcd."""
        if not key or not range_end:
            return self.key(key), range_end
        return self.prefix + key, self.end if range_end == FROM_KEY else self.prefix + range_end

    def has(self, key: bytes) -> bool:
        """Whether a key at etcd is in the namespace."""
        return key.startswith(self.prefix)

    def strip(self, kv: kv_pb2.KeyValue) -> None:
        """Remove the prefix from a key-value of etcd, in place."""
        kv.key = kv.key.removeprefix(self.prefix)

    def strip_all(self, kvs: Iterable[kv_pb2.KeyValue]) -> None:
        """Remove the prefix from several key-values, in place."""
        for kv in kvs:
            kv.key = kv.key.removeprefix(self.prefix)

    def scan(self, data: bytes) -> WatchResponse:
        """Read an encoded WatchResponse of etcd, with the keys as clients see them.

        Its events are decoded for that, once for all clients. Raises ScanError.
        """
        response = scan_watch_response(data)
        if response.events:
            message = self._message.FromString(b"".join([event.encoded for event in response.events]))
            for event in message.events:
                self.strip(event.kv)
                if event.HasField("prev_kv"):
                    self.strip(event.prev_kv)
            response.events = scan_watch_response(message.SerializeToString()).events
        return response
