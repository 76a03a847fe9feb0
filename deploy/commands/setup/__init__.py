"""Commands for writing and checking a run file."""
