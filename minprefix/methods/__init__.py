"""The methods that the paper compares with prefix-tuning, and the files of trained parameters."""
