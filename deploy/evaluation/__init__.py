"""Evaluate a policy on held-out prompts."""
