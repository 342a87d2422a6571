"""Calls other than Watch: forwarded to etcd, byte for byte or with keys and addresses translated."""
