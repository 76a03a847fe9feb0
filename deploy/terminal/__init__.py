"""What a person sees in the terminal and types into it."""
