"""Tests of deploy.stages."""
