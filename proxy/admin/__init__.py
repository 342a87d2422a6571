"""Monitoring: metrics, health and the status page, on a separate port.

`snapshot` collects the state at one moment, `delays` histograms, `memory` what the process takes, `monitor` the last
hour; `aggregate` adds up the processes of `--workers`. Shown by `metrics` (Prometheus), `views` (the page), `clients`
(the list of connections) and `health`, which `self_probe` feeds; served by `port` on `http`, and by `client_port`.
"""
