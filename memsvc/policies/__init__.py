"""Policies of allocation behind one interface: the product, and those that it is compared with."""
