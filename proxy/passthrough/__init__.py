"""Calls other than Watch: forwarded to etcd, unchanged or with keys and addresses translated."""
