"""Questions about short generated articles. A wrong answer gets a lower reward than "I don't know."."""
