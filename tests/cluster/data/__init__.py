"""Tests of cluster.data."""
