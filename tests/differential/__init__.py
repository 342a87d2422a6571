"""Watch programs, each run against a real etcd directly and through the proxy: what came back must be the same.

- `steps`: what a program is made of; `programs_*`: the programs; `table`: all of them.
- `player`: plays a program against an address and records every response a raw client got.
- `freedoms`: what the watch contract leaves free, and nothing else; recordings are compared in that form.
- `stage`: the etcds and proxies of a run.
- `defects`: what older etcds are known to do wrong, by name.
"""
