"""What the memory service costs: measurements of its core, and of a peer's in another interpreter.

`quire bench memory` runs them together with those that need a gateway (`gateway.bench`).
"""
