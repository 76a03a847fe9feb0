"""The sampling engine, its thread and its weight swaps."""
