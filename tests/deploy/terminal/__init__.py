"""Tests of deploy.terminal."""
