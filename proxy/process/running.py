"""The start of `watchmux serve`: in this process, or in several."""

from __future__ import annotations

from proxy.config.knobs import Settings
from proxy.process import serving


def run(settings: Settings, notes: list[str], parent_fd: int | None, read_again: serving.ReadAgain) -> int:
    """Run the proxy until a signal or the exit of the parent process; return the exit code. Raises Failed."""
    if settings.listener.workers != 1:
        from proxy.process import supervising  # only with --workers

        return supervising.run(settings, notes, parent_fd, read_again)
    import uvloop

    return uvloop.run(serving.serve(settings, notes, parent_fd, read_again))
