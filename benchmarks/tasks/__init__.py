"""Measure whole runs of tasks."""
