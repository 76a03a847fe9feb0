"""Tests of reward_service.scorers."""
