"""Tests of reward_service.client."""
