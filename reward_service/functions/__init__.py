"""Call users' Python reward functions, each in a process of its own."""
