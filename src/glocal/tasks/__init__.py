"""Tasks: a network for the data, its criterion, and what its outputs mean."""
