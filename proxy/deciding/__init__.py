"""What the engine decides, apart from what it does: pure and synchronous, driven by proxy and simulator alike."""
