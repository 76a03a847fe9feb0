"""Tests of learner.ppo."""
