"""The settings. `knobs` declares each of them, with a description in the form of `describing`.

`file` combines their sources: `values` parses them, `variables` knows the environment. `applied` gives them to the
parts of the proxy, `rendering` shows them, and `advice` notes what may surprise.
"""
