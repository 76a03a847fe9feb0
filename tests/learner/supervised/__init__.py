"""Tests of learner.supervised."""
