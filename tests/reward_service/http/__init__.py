"""Tests of reward_service.http."""
