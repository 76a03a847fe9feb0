"""Tests of cluster.actors."""
