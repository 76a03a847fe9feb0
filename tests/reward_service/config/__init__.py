"""Tests of reward_service.config."""
