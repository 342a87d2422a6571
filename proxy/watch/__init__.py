"""Watches: the service that clients call, the engine that drives the core, and the delivery of events.

`service` reads requests, unusual ones by `unusual`, and gives them to `engine`, the only driver of the core. What the
core returns goes by `delivery` to the `outlets` of sessions. `settings` has the limits.
"""
