"""Our watches at etcd: one stream for many of them, resumed after any break; the state is pure, the client does I/O."""
