"""PPO: advantages, losses, the step and its learner group."""
