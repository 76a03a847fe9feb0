"""Models and data sets of the Hugging Face Hub: their names in a run file, and local folders with their files."""
