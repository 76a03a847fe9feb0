"""Publish and fetch weight versions."""
