"""Where clients connect: sockets, TLS handshakes, connections, and the routes of their streams.

`listener` owns the connections and routes each stream to its handler. A connection comes from `sockets`, by a
`handshake`, or from another process by `fd_passing`; `connection` is one over HTTP/2, with its `timeouts`, `pings` and
`late_acks`, `http1` one that is forwarded; `leaving` cleans up after it. `turns` bounds the work for all clients, and
`write_queue` writes what is queued for them. `calls` is the server side of gRPC for handlers, counted by
`call_metrics`. `settings` has limits and counters.
"""
