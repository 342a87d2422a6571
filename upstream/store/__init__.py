"""The bundled store: an etcd-compatible server in one process, for trials, tests and small installations.

From the inside out: `index` and `mvcc` hold keys and revisions, `txn` runs requests on them, `spans`, `watch_batch`,
`watchable` and `watch_requests` implement watches, `lease`, `alarms` and `auth` (with `auth_admin`) the rest of the
data, and `state` wires them together. All of these are pure.

`recorder` is the interface to durability and `journal` the file behind it; `writer` orders apply, commit and publish;
`loops` is the background work. The services turn gRPC calls (`calls`, with the `errors` of etcd) into calls on the
state: `service` is their base class; `kv_service`, `watch_service`, `lease_service`, `lock_service` and
`election_service` (with `queueing`), `auth_service`, `cluster_service`, `maintenance_service`. `http` serves metrics,
and `server` puts everything together.
"""
