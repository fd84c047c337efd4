"""Paged-attention and cache kernels.

`kernels` is also the name of a distribution that `transformers` probes for. The version below, and importing neither
torch nor triton here, keep a checkout on `sys.path` from breaking `import transformers`.
"""

__version__ = "0.0.0"
