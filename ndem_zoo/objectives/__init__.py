"""What is minimized: one file for each objective, with its noise, its heads and its weights."""
