"""Tests of rollout_actors.engine."""
