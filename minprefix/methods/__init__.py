"""What the paper compares prefix-tuning with."""
