"""Benchmarks: CPU per delivered event, delay and memory, compared with etcd's own grpc-proxy in the same run."""
