"""The etcd side: connections to etcd, the proxy's own calls, and the endpoints. `watching` has the watches, `store` the
bundled store.

Connections, from the socket up: `transport`, `connecting` and `tls` open one; `connection` is one, with its calls and
their `heads` (`batching` and `answer_due` belong to it; `interfaces` is what it calls); `connections` are all to one
endpoint.

Endpoints: `endpoints` and `discovery` find them, `problems` logs what is wrong with them, `fitness` says whether a
member serves calls. `slot` is one of them in the `pool`, which serves all calls but watches; `dial` finds the server
for the watches, and `watch_route` finds loops of proxies.

Calls of the proxy's own: `unary` makes one on a given connection; `attempts` decides which endpoints it is tried at,
and `hedged` carries that out. `credentials` logs in.

For all: `settings`, `errors`, `expiry` (timers), `namespace`. `client` is a public API for watches.
"""
