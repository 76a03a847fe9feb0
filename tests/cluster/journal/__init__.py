"""Tests of cluster.journal."""
