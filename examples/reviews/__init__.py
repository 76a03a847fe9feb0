"""Reviews written by a small grammar: every stage of RLHF on a laptop."""
