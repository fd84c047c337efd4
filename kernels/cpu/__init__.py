"""A decoder's whole step on the CPU, in C++: one call a step, without Python's lock."""
