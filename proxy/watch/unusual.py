"""Reads the WatchRequests that `proto.plain_request` leaves to protobuf, which the first of them loads (10 ms once)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from coalesce.inputs import CreateRequest
from proto.fields import ScanError
from proto.filters import LONG_BYTES, meaning_of, shortened

if TYPE_CHECKING:
    from proto.pb import rpc_pb2

NOPUT: Final = 0
NODELETE: Final = 1
"""WatchCreateRequest.FilterType (rpc.proto)."""

FILTERS_FEW: Final = 16
"""Up to this number, filters are searched one by one."""


def parse(message: bytes) -> rpc_pb2.WatchRequest:
    """Decode a WatchRequest. Raises ScanError."""
    from google.protobuf.message import DecodeError

    from proto.pb import rpc_pb2

    try:
        return rpc_pb2.WatchRequest.FromString(shortened(message) if len(message) >= LONG_BYTES else message)
    except DecodeError as error:
        raise ScanError(str(error)) from None


def create_request(request: rpc_pb2.WatchCreateRequest) -> CreateRequest:
    """Convert a WatchCreateRequest to the core's form; "now" is None from here on."""
    no_put, no_delete = filters_of(request)
    return CreateRequest(
        key=request.key,
        range_end=request.range_end,
        start_revision=request.start_revision or None,
        watch_id=request.watch_id,
        progress_notify=request.progress_notify,
        no_put=no_put,
        no_delete=no_delete,
        prev_kv=request.prev_kv,
        fragment=request.fragment,
    )


def filters_of(request: rpc_pb2.WatchCreateRequest) -> tuple[bool, bool]:
    """Return whether puts and deletes are filtered out. A request may hold two million filters of only two kinds."""
    filters = request.filters
    if not filters:
        return False, False
    if len(filters) <= FILTERS_FEW:
        return NOPUT in filters, NODELETE in filters
    # Searched as bytes, which takes a hundredth of the time.
    only = type(request)()
    only.filters.MergeFrom(filters)
    packed = only.SerializeToString()
    start = 1
    while packed[start] > 127:
        start += 1
    meaning = meaning_of(packed[start + 1 :])
    if meaning is None:
        # There are negative numbers, which take ten bytes each.
        return NOPUT in filters, NODELETE in filters
    return b"\x00" in meaning, b"\x01" in meaning
