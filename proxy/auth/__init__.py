"""Who may watch what, which revision is now, and whether the store is still the one it was."""
