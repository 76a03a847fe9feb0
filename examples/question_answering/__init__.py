"""Questions over short made-up articles, where a wrong answer is worse than none."""
