"""The wire formats between clients, this proxy and etcd. Without I/O, and without imports from other packages.

`http2` is the HTTP/2 connection; `framing` is gRPC on top of it, `pacing` the same step by step. Watch messages at byte
level, because the data path never builds a message: `scan` reads and writes responses, `large` splits them, `event_key`
and `spans` match events with ranges, `shared_response` writes one for many watches, `plain_request` reads and writes
requests, `filters` shortens them. `messages` has the other messages of a serving process, `fields` protobuf's encoding,
`etcd_errors` the texts that clients compare. `pb` has etcd's .proto files and the code that `generate` makes from them.

`proto` is also the import name of PyPI's proto-plus. This is an application: install it in its own environment.
"""

OWNER = "watchmux"
"""The start of the program recognises its own package by this line (`proxy/cli`)."""
