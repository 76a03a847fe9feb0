"""Ranks, RLlib's learner group, sharding and gradients."""
