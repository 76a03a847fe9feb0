"""Tests of deploy.ring."""
