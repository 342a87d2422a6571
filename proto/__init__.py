"""The wire formats between clients, this proxy and etcd.

`proto.pb` holds etcd's .proto files and the code generated from them; `proto.scan` reads and writes watch messages at
byte level, because the data path never builds a message; `proto.framing` is gRPC's framing on top of HTTP/2;
`proto.http2` is the HTTP/2 connection itself. This package does no I/O and imports no other package of this project.

`proto` is also the import name of PyPI's proto-plus. This is an application: install it in its own environment.
"""
