"""Calls other than Watch: forwarded to etcd, unchanged or with keys and addresses translated.

`relay` forwards calls frame by frame; `holding` keeps them while no etcd is connected (`waiting` decides for how long),
`unread` bounds what clients leave unread, `endless` ends calls that a drain must not wait for, `answers` ends others.

Shared reads: `sharing` decides which calls share one, `shared_reads` carries it out, `shared_answer` passes the answer
on.

Translated calls: `translation` has the form of the rules, `namespaced_calls` and `advertised` the rules; `translating`
is the relay that applies them, by `message_work` and `rewriting`.

`route_status` answers Maintenance.Status for other proxies. `settings` has limits and counters.
"""
