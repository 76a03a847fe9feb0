"""Ranking items for users of a small world of tastes, learnt from simulated clicks."""
