"""SFT and reward-model training."""
