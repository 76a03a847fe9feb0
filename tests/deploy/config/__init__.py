"""Tests of deploy.config."""
