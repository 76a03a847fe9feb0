"""Whole runs and rings."""
