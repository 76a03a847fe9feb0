"""Tests of deploy.runtime."""
