"""Tests of reward_service.parsing."""
