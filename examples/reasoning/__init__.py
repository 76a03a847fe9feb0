"""Sums worked out in steps, where the reward sees the answer alone."""
