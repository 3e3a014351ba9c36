"""Tasks as examples."""
