"""Start, probe and restart Ray actors."""
