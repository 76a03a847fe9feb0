"""Commands that use a trained policy: evaluate it, talk to it, export it."""
