"""Tests of deploy.run."""
