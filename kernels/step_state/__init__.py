"""The state of open sequences on the device: written by deltas, read and advanced by decode steps."""
