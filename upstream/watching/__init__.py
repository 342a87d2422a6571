"""The proxy's watches at etcd: many share a stream and resume after a break; the state is pure, the rest does I/O.

Pure, and driven by the simulator too: `state` decides all about watches and returns `effects`; its parts are `stream`
(data), `registrations`, `streams` (which stream carries which watch), `suspects`, `positions` and `proof`. `choice`
decides which server to use, `lineage` whether its store has the known history.

I/O: `client` is the interface, and `listener` what it notifies. `stream_calls` carries out the effects: `call` is the
call of one stream, `feed` reads its responses, `places` finds it a connection, `unanswered` finds creates without an
answer, `own_user` logs in. `failover` finds and replaces the server; `history_check`, `route_check` and `leader` watch
over it.
"""
