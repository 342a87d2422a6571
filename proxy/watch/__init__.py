"""Watches: the service that clients call, the engine that drives the core, and where events leave."""
