"""Read data sets, render chat templates, order prompts."""
