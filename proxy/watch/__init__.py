"""Watches: the service that clients call, the engine that drives the core, and the delivery of events."""
