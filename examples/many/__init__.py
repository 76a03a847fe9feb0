"""Four tasks at once: questions, sums, translations and dialogues, one model for all of them."""
