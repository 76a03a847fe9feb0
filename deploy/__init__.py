"""Puts a run on machines: the composition root and the command line."""
