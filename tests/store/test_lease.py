"""The lessor, on a virtual clock."""

from __future__ import annotations

import pytest

from proto.pb import rpc_pb2
from tests.store.both import new_state
from upstream.store import errors
from upstream.store.errors import StoreError
from upstream.store.lease import Lessor
from upstream.store.state import StoreState


def test_an_expired_lease_deletes_its_keys_in_one_revision() -> None:
    state = new_state()
    grant(state, 7, 10)
    for key in (b"b", b"a"):
        state.put(rpc_pb2.PutRequest(key=key, lease=7))
    assert state.expire_leases(9.9) == 0
    revision = state.mvcc.revision
    assert state.expire_leases(10.0) == 1
    assert state.mvcc.revision == revision + 1
    assert [(r.key, r.deleted) for r in state.mvcc.changes(revision + 1, revision + 1)[0]] == [
        (b"a", True),
        (b"b", True),
    ]
    assert not state.lessor.exists(7)
    assert state.expire_leases(100.0) == 0


def grant(state: StoreState, lease_id: int, ttl_s: int, now: float = 0.0) -> rpc_pb2.LeaseGrantResponse:
    return state.lease_grant(rpc_pb2.LeaseGrantRequest(ID=lease_id, TTL=ttl_s), now)


def test_keep_alive_postpones_expiry() -> None:
    state = new_state()
    grant(state, 7, 10)
    assert state.lease_keep_alive(7, 5.0).TTL == 10
    assert state.expire_leases(14.0) == 0
    assert state.lease_time_to_live(rpc_pb2.LeaseTimeToLiveRequest(ID=7), 14.0).TTL == 1
    assert state.expire_leases(15.0) == 1
    assert state.lease_keep_alive(7, 15.0).TTL == 0
    assert state.lease_time_to_live(rpc_pb2.LeaseTimeToLiveRequest(ID=7), 15.0).TTL == -1


def test_an_expired_lease_not_revoked_yet_cannot_be_renewed() -> None:
    state = new_state()
    grant(state, 7, 10)
    assert state.lease_keep_alive(7, 10.0).TTL == 0


def test_a_key_is_attached_to_its_last_lease_only() -> None:
    state = new_state()
    grant(state, 7, 10)
    grant(state, 8, 20)
    for lease in (7, 8):
        state.put(rpc_pb2.PutRequest(key=b"a", lease=lease))
    state.put(rpc_pb2.PutRequest(key=b"b", lease=7))
    state.put(rpc_pb2.PutRequest(key=b"b"))
    assert state.lessor.keys(7) == []
    assert state.lessor.keys(8) == [b"a"]
    state.put(rpc_pb2.PutRequest(key=b"a", value=b"2", ignore_lease=True))
    assert state.lessor.keys(8) == [b"a"]
    state.delete_range(rpc_pb2.DeleteRangeRequest(key=b"a"))
    assert state.lessor.keys(8) == []


def test_a_lease_id_granted_again_expires_once() -> None:
    state = new_state()
    grant(state, 7, 10)
    state.lease_revoke(7)
    grant(state, 7, 20, now=1.0)
    assert state.expire_leases(12.0) == 0
    assert state.expire_leases(21.0) == 1
    assert state.expire_leases(99.0) == 0


def test_a_short_ttl_is_raised_and_a_missing_id_generated() -> None:
    state = new_state()
    response = grant(state, 0, 0)
    assert (response.ID, response.TTL) == (1000, 2)


@pytest.mark.parametrize(
    ("lease_id", "ttl_s", "refusal"),
    [
        (0, 10, errors.LEASE_NOT_FOUND),
        (1, 10, errors.LEASE_EXISTS),
        (2, 9_000_000_001, errors.LEASE_TTL_TOO_LARGE),
    ],
)
def test_grants_that_etcd_refuses_are_refused(lease_id: int, ttl_s: int, refusal: errors.StoreRefusal) -> None:
    lessor = Lessor()
    lessor.grant(1, 10, 0.0)
    with pytest.raises(StoreError) as error:
        lessor.grant(lease_id, ttl_s, 0.0)
    assert error.value.refusal == refusal
