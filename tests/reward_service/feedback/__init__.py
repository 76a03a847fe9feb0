"""Tests of reward_service.feedback."""
