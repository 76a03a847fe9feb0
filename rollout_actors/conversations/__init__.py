"""Conversations between the policy and an environment."""
