"""The tasks' datasets as examples: a source and its references."""
