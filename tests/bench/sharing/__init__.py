"""The effect of clients on each other when they share one proxy, compared with the same load directly at etcd.

Each module here holds some scenarios and lists them in `SCENARIOS`; `python -m tests.bench.sharing` runs them.
"""
