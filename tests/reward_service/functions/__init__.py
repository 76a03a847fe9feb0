"""Tests of reward_service.functions."""
