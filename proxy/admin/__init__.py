"""Monitoring: metrics, health and the status page, on a separate port."""
