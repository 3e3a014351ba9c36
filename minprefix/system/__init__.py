"""Errors in one line, whole files, signals, device and dtype, several processes."""
