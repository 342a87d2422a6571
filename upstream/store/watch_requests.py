"""The requests of a Watch stream: create, cancel, progress.

Pure, so that the simulator handles requests in the same way; the service only reads them from the wire. The checks and
their order are those of etcd's server/etcdserver/api/v3rpc/watch.go.
"""

from __future__ import annotations

from collections.abc import Callable

from proto.etcd_errors import reason_of
from proto.pb import rpc_pb2
from proto.spans import FROM_KEY
from upstream.store.errors import StoreError
from upstream.store.watchable import ServedStream

CONTROLS_MAX = 16
"""Queued control answers at which a stream's requests are no longer read (etcd's ctrlStreamBufLen)."""

_Create = rpc_pb2.WatchCreateRequest

Check = Callable[[bytes, bytes], None]
"""Raises StoreError when the stream's user may not read [key, range_end)."""


def take_request(stream: ServedStream, request: rpc_pb2.WatchRequest, check: Check) -> None:
    """Execute a request and queue its answer, if any, on the stream."""
    kind = request.WhichOneof("request_union")
    if kind == "create_request":
        create = request.create_request
        # `create` refuses a negative start, which takes precedence over permissions.
        if create.start_revision >= 0 and (reason := _refusal(create, check)):
            stream.refuse(reason)
            return
        stream.create(
            create.key,
            create.range_end,
            create.start_revision,
            create.watch_id,
            no_put=_Create.NOPUT in create.filters,
            no_delete=_Create.NODELETE in create.filters,
            prev_kv=create.prev_kv,
            fragment=create.fragment,
            progress_notify=create.progress_notify,
        )
    elif kind == "cancel_request":
        stream.cancel(request.cancel_request.watch_id)
    elif kind == "progress_request":
        stream.request_progress()


def _refusal(create: rpc_pb2.WatchCreateRequest, check: Check) -> str | None:
    """Return why the stream's user may not watch the range; None if it may."""
    try:
        check(create.key or FROM_KEY, create.range_end)
    except StoreError as error:
        return reason_of(error.refusal.code, error.refusal.text)
    return None
