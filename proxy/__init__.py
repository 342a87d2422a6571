"""The program. `server` puts the parts together; each folder is one of them. `errors`, `logs` and `version` serve all.

The way of a client's call: `listening`, then `watch` for watches and `passthrough` for all else, with `auth`. Around
them: `admin` shows what they do, `config` has the settings, `process` runs them, `cli` is the command line, and
`measuring` has the commands that try and measure a proxy.
"""
