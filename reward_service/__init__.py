"""Scores responses: a Ray Serve application with an HTTP server."""
