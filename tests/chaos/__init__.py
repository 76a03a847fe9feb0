"""Runs whose parts are killed, hang or fail."""
