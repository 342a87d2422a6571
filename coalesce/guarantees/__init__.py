"""The six guarantees of a watch as checkers over recorded histories."""
