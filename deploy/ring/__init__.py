"""The asynchronous PPO loop: queue, rollout actors, reward service, learners, weights."""
