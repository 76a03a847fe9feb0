"""Commands that show or recompute what a run recorded."""
