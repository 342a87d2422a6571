"""Demonstrates and measures what the proxy saves: `demo`, `measure`, `observe`, `comparison` with its `report`, and
`status`; `load` has the clients.
"""
