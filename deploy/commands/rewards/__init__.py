"""Commands about rewards: serve them, measure them, collect preferences."""
