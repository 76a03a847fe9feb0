"""Tests of reading rows of files."""
