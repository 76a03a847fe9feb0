"""Tests of deploy.data."""
