"""Prompts in, sampled trajectories out; the only package that knows vLLM."""
