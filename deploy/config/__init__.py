"""Read and check a run file."""
