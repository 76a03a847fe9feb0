"""Tests of deploy.commands."""
