"""Example tasks. Each folder has a run file and the small Python modules that it names by dotted path."""
