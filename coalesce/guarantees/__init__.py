"""The six guarantees of a watch as `checkers` of recorded histories: the `truth`, and the `life` of each watch."""
