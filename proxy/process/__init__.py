"""The proxy as a process: start, reload, stop, child processes and the service manager.

`running` chooses between one process and several. `serving` is the life of one: `reloading` applies SIGHUP, `endpoints`
decides which endpoints are in force, `service_manager` notifies systemd, `descriptors` reserves files, and `addresses`
explains why it cannot listen.

Of several (`--workers`): `supervising` is the parent, whose decisions `supervision` makes, purely; `distributor` and
`balancing` give clients to workers, `shares` divides the settings, `member` is the side of the children. `child` starts
other child processes.
"""
