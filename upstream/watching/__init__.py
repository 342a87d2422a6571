"""The proxy's watches at etcd: many share a stream and resume after a break; the state is pure, the client does I/O."""
