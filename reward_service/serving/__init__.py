"""The Ray Serve application of the reward service."""
