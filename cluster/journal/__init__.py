"""The journal: every event of a run, on disk, in order."""
