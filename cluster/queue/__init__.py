"""Admit prompts and hand out finished groups in order."""
