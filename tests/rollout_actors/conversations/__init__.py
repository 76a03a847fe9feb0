"""Tests of rollout_actors.conversations."""
