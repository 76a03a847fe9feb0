"""Measure single parts."""
