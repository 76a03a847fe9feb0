"""Tests of rollout_actors.environments."""
