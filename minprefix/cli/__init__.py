"""What command lines need: options, settings, run folders, scores of a run, prefix files."""
