"""Chooses tokens on the device."""
