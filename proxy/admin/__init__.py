"""What operators see: metrics, health and the status page, on a port of their own."""
