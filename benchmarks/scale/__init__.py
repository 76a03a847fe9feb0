"""Measure the ring with stand-in actors."""
