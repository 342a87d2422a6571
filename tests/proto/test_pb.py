"""The .proto files match etcd's, and the generated code matches them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from google.protobuf.descriptor import FieldDescriptor as Field
from google.protobuf.message import Message

from proto.generate import FOLDER, ROOT, generate
from proto.pb import auth_pb2, kv_pb2, rpc_pb2, v3election_pb2, v3lock_pb2

# The versions that the tools write into their output; the rest of the output must be as committed.
_VERSIONS = re.compile(
    r"^# Protobuf Python Version: .*$"
    r"|^    _runtime_version\.Domain\.PUBLIC,\n(    \d+,\n){3}    '.*',$"
    r"|^GRPC_GENERATED_VERSION = .*$",
    re.MULTILINE,
)

# The messages that proto/scan.py decodes and encodes by field number: etcd's rpc.proto and kv.proto.
FIELDS: dict[type[Message], dict[str, tuple[int, int]]] = {
    rpc_pb2.WatchRequest: {
        "create_request": (1, Field.TYPE_MESSAGE),
        "cancel_request": (2, Field.TYPE_MESSAGE),
        "progress_request": (3, Field.TYPE_MESSAGE),
    },
    rpc_pb2.WatchCreateRequest: {
        "key": (1, Field.TYPE_BYTES),
        "range_end": (2, Field.TYPE_BYTES),
        "start_revision": (3, Field.TYPE_INT64),
        "progress_notify": (4, Field.TYPE_BOOL),
        "filters": (5, Field.TYPE_ENUM),
        "prev_kv": (6, Field.TYPE_BOOL),
        "watch_id": (7, Field.TYPE_INT64),
        "fragment": (8, Field.TYPE_BOOL),
    },
    rpc_pb2.WatchCancelRequest: {"watch_id": (1, Field.TYPE_INT64)},
    rpc_pb2.WatchProgressRequest: {},
    rpc_pb2.WatchResponse: {
        "header": (1, Field.TYPE_MESSAGE),
        "watch_id": (2, Field.TYPE_INT64),
        "created": (3, Field.TYPE_BOOL),
        "canceled": (4, Field.TYPE_BOOL),
        "compact_revision": (5, Field.TYPE_INT64),
        "cancel_reason": (6, Field.TYPE_STRING),
        "fragment": (7, Field.TYPE_BOOL),
        "events": (11, Field.TYPE_MESSAGE),
    },
    rpc_pb2.ResponseHeader: {
        "cluster_id": (1, Field.TYPE_UINT64),
        "member_id": (2, Field.TYPE_UINT64),
        "revision": (3, Field.TYPE_INT64),
        "raft_term": (4, Field.TYPE_UINT64),
    },
    kv_pb2.Event: {
        "type": (1, Field.TYPE_ENUM),
        "kv": (2, Field.TYPE_MESSAGE),
        "prev_kv": (3, Field.TYPE_MESSAGE),
    },
    kv_pb2.KeyValue: {
        "key": (1, Field.TYPE_BYTES),
        "create_revision": (2, Field.TYPE_INT64),
        "mod_revision": (3, Field.TYPE_INT64),
        "version": (4, Field.TYPE_INT64),
        "value": (5, Field.TYPE_BYTES),
        "lease": (6, Field.TYPE_INT64),
    },
}

# Path of each method -> whether the client, and the server, sends a stream.
METHODS = {
    "/etcdserverpb.KV/": {"Range": "", "Put": "", "DeleteRange": "", "Txn": "", "Compact": ""},
    "/etcdserverpb.Watch/": {"Watch": "client server"},
    "/etcdserverpb.Lease/": {
        "LeaseGrant": "",
        "LeaseRevoke": "",
        "LeaseKeepAlive": "client server",
        "LeaseTimeToLive": "",
        "LeaseLeases": "",
    },
    "/etcdserverpb.Cluster/": {
        "MemberAdd": "",
        "MemberRemove": "",
        "MemberUpdate": "",
        "MemberList": "",
        "MemberPromote": "",
    },
    "/etcdserverpb.Maintenance/": {
        "Alarm": "",
        "Status": "",
        "Defragment": "",
        "Hash": "",
        "HashKV": "",
        "Snapshot": "server",
        "MoveLeader": "",
        "Downgrade": "",
    },
    "/etcdserverpb.Auth/": {
        "AuthEnable": "",
        "AuthDisable": "",
        "AuthStatus": "",
        "Authenticate": "",
        "UserAdd": "",
        "UserGet": "",
        "UserList": "",
        "UserDelete": "",
        "UserChangePassword": "",
        "UserGrantRole": "",
        "UserRevokeRole": "",
        "RoleAdd": "",
        "RoleGet": "",
        "RoleList": "",
        "RoleDelete": "",
        "RoleGrantPermission": "",
        "RoleRevokePermission": "",
    },
    "/v3lockpb.Lock/": {"Lock": "", "Unlock": ""},
    "/v3electionpb.Election/": {"Campaign": "", "Proclaim": "", "Leader": "", "Observe": "server", "Resign": ""},
}


@pytest.mark.parametrize("message", FIELDS, ids=lambda message: message.DESCRIPTOR.full_name)
def test_watch_messages_have_etcds_fields(message: type[Message]) -> None:
    fields = {field.name: (field.number, field.type) for field in message.DESCRIPTOR.fields}
    assert fields == FIELDS[message]


def test_enums_of_watches_have_etcds_numbers() -> None:
    assert dict(kv_pb2.Event.EventType.items()) == {"PUT": 0, "DELETE": 1}
    assert dict(rpc_pb2.WatchCreateRequest.FilterType.items()) == {"NOPUT": 0, "NODELETE": 1}


def test_protobuf_packages_have_etcds_names() -> None:
    packages = {
        kv_pb2: "mvccpb",
        auth_pb2: "authpb",
        rpc_pb2: "etcdserverpb",
        v3lock_pb2: "v3lockpb",
        v3election_pb2: "v3electionpb",
    }
    for module, package in packages.items():
        assert module.DESCRIPTOR.package == package


def test_services_and_methods_are_etcds() -> None:
    methods: dict[str, dict[str, str]] = {}
    for module in (kv_pb2, auth_pb2, rpc_pb2, v3lock_pb2, v3election_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            streams = methods.setdefault(f"/{service.full_name}/", {})
            for method in service.methods:
                sides = ("client" * method.client_streaming, "server" * method.server_streaming)
                streams[method.name] = " ".join(filter(None, sides))
    assert methods == METHODS


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    fresh = {path.name: path for path in generate(tmp_path)}
    committed = {path.name: path for path in (ROOT / FOLDER).glob("*_pb2*.py*")}
    assert fresh.keys() == committed.keys(), "run `make proto`"
    for name, path in fresh.items():
        assert _without_versions(path) == _without_versions(committed[name]), f"{name}: run `make proto`"


def _without_versions(path: Path) -> str:
    return _VERSIONS.sub("", path.read_text(encoding="utf-8"))
