"""Calls that are not watches: passed on to etcd, byte for byte or with keys and addresses translated."""
