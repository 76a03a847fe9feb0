"""Sums worked out in steps. The reward depends only on the answer."""
