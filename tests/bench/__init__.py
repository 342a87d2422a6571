"""Benchmarks: CPU per delivered event, delay and memory, beside etcd's own grpc-proxy in the same run."""
