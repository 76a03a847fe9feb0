"""Prompts as the rollout actors sample them."""
