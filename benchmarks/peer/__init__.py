"""Measure other trainers."""
