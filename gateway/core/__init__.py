"""The scheduler: pure state, no I/O, no clock."""
