"""Write the letter a: the smallest task, with a published reference curve."""
