"""Store human preferences and serve the labelling page."""
