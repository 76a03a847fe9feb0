"""Responses in, rewards out: a Ray Serve application with an HTTP face."""
