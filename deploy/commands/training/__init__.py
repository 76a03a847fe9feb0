"""Commands that start runs, continue them and change them while they run."""
