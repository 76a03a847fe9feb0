"""The files of a run directory: layout, opening, locks, finished artifacts."""
