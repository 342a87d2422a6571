"""Demonstrates and measures what the proxy saves: demo, measure, observe and their report; `load/` has the clients."""
