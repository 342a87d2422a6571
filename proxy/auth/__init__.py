"""Permission checks, reads of the current revision, and the detection of a restored store."""
