"""Tests of deploy.evaluation."""
