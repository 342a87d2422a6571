"""What clients see of each other when they share one proxy, beside the same load straight at etcd.

Each module here holds some scenarios and lists them in `SCENARIOS`; `python -m tests.bench.sharing` runs them.
"""
