"""The HTTP server of the reward service and its limits."""
