"""The load: gRPC clients, in processes of their own."""

import os

# gRPC's library prints lines of its own about failed handshakes; the commands report failures in one line.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
