"""Errors of one line, atomic writes, signals, the choice of device and dtype, torchrun."""
