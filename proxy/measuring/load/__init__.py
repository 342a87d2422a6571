"""The load: gRPC clients, in processes of their own.

A `trial` is one load on one `target`: `stage` starts the processes, `plan` spreads the watches, `run` drives each
`client` and the `writer`. `judge` checks what the clients recorded; `prometheus` and `sampling` read metrics, `show`
draws bars.
"""

import os

# gRPC's library prints lines of its own about failed handshakes; the commands report failures in one line.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
