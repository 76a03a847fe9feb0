"""Settings of the reward service and its scorers."""
