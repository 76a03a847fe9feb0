"""Read numbers and code out of responses."""
