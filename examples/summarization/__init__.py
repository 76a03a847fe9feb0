"""Summaries of generated reports within a length limit, against a reward model that likes them long."""
