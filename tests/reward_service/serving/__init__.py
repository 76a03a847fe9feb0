"""Tests of reward_service.serving."""
