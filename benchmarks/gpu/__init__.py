"""Measure on a GPU."""
