"""Tasks: a folder each, with a run file and the small Python files it names by dotted path."""
