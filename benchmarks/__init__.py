"""Figures: each module measures one thing as a ratio in one run and returns what goes into the README's tables."""
