"""Permission checks, reads of the current revision, and the detection of a restored store.

`queries` decides, purely, with `permission_checks`, `admitted` and `restore`, on the data of `model`; `reads` makes the
calls. `cn_guard` refuses a client certificate with a `common_name` while etcd's auth is on.
"""
