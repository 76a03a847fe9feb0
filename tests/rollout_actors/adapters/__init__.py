"""Tests of rollout_actors.adapters."""
