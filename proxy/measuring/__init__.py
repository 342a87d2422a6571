"""What the proxy saves, shown: demo, measure, observe and their report; `load/` holds the real clients."""
