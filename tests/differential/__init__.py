"""Watch programs, each run against a real etcd directly and through the proxy: the responses must be the same.

- `steps`: the steps of a program; `programs_*`: the programs; `table`: all of them.
- `player`: runs a program against an address and records every response that a raw client got.
- `freedoms`: the differences that the watch contract permits; recordings are compared in a form without them.
- `stage`: the etcds and proxies of a run.
- `defects`: known faults of older etcds, by name.
"""
