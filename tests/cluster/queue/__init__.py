"""Tests of cluster.queue."""
