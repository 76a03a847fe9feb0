"""Samples responses to prompts and turns them into scored trajectories.

The only package that imports vLLM.
"""
