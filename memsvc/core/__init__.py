"""The memory service as a pure state machine: no clock, no I/O, no randomness. Time comes in as an argument."""
