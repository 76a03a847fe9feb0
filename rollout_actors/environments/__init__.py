"""Environments of multi-turn tasks."""
