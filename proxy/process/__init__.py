"""The proxy as a process: start, reload, stop, child processes and the service manager."""
