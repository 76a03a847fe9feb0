"""Tests of cluster.weights."""
