"""Summaries of generated reports within a length limit, with a reward model that prefers long summaries."""
