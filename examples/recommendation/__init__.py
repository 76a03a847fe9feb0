"""Rank items for simulated users, learnt from simulated clicks."""
