"""What the memory service costs a gateway: decode steps in this process and over gRPC, and the RPCs that a step awaits.

`python -m gateway.bench` runs all measurements and prints one JSON document; `quire bench memory` shows it.
"""
