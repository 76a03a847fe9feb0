"""Clients of the reward service."""
