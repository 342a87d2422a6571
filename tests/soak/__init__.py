"""A long combined run: a real etcd, the proxy as a process, many kinds of clients, and random faults.

`python -m tests.soak --minutes n`. It finds problems that tests of single faults do not show: an event lost once in a
million, a descriptor leaked each time, memory that is never released.
"""
