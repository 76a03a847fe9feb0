"""Scored trajectories in, weights out: PPO on a learner group, and the supervised stages."""
