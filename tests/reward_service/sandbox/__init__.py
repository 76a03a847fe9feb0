"""Tests of reward_service.sandbox."""
