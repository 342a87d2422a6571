"""
The bundled store: an etcd-compatible server in one process, for trying out, for tests and for small installations.

From the inside out: `index` and `mvcc` keep keys and revisions, `txn` runs requests on them, `spans`, `watch_batch`,
`watchable` and `watch_requests` are the watches; `lease`, `alarms` and `auth` (with `auth_admin`) are what their names
say; `state` wires them together.
All of that is pure. `recorder` is the seam to durability and `journal` the file behind it; `writer` puts apply, commit
and publish in order; `loops` is the background work. The services turn gRPC calls (`calls`) into calls on the state:
`service` is what they are made of, `queueing` what Lock and Election share, `http` serves metrics and
`server` is the whole.
"""
