"""Identities of blocks: one format, everywhere and for ever."""

import struct
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from quire.hashing import DIGEST_BYTES, PrefixRoot, chain, tenant_salt

SALT = tenant_salt(b"0123456789abcdef", "")
ROOT = PrefixRoot("smollm2", 16, "float32", "", SALT, "")
# What version 1 of the format gives for the tokens 0 .. 39 under ROOT. It must never change: other processes hold
# blocks under these names.
GOLDEN_ROOT = "84bea0ddb3aada3d91b7c23d9cda5492"
GOLDEN = ["a2ff2d88ac589f52193dc55e0a6485cc", "97b9bb1703a2c26e2ac27af26b318f16"]


def packed(tokens: list[int]) -> bytes:
    """Returns tokens as they are hashed."""
    return struct.pack(f"<{len(tokens)}I", *tokens)


def test_the_format_never_changes() -> None:
    """Otherwise an upgrade matches nothing, or worse, something else."""
    assert ROOT.digest().hex() == GOLDEN_ROOT
    assert [one.hex() for one in chain(ROOT.digest(), packed(list(range(40))), 16)] == GOLDEN


def test_another_process_computes_the_same() -> None:
    """Replicas match one another's blocks; Python's own hash() would differ by process."""
    code = (
        "import struct; from quire.hashing import *\n"
        "root = PrefixRoot('smollm2', 16, 'float32', '', tenant_salt(b'0123456789abcdef', ''), '')\n"
        "print(chain(root.digest(), struct.pack('<16I', *range(16)), 16)[0].hex())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == GOLDEN[0]


def test_whatever_differs_in_the_root_separates_everything_below() -> None:
    """Sharing across models, tenants or salts would show one user another's text."""
    roots = [
        ROOT,
        PrefixRoot("other", 16, "float32", "", SALT, ""),
        PrefixRoot("smollm2", 32, "float32", "", SALT, ""),
        PrefixRoot("smollm2", 16, "bfloat16", "", SALT, ""),
        PrefixRoot("smollm2", 16, "float32", "adapter", SALT, ""),
        PrefixRoot("smollm2", 16, "float32", "", tenant_salt(b"0123456789abcdef", "acme"), ""),
        PrefixRoot("smollm2", 16, "float32", "", SALT, "salt"),
    ]
    assert len({root.digest() for root in roots}) == len(roots)


def test_fields_of_the_root_cannot_flow_into_one_another() -> None:
    """Without lengths ("ab", "c") and ("a", "bc") would be one tenant."""
    one = PrefixRoot("smollm2", 16, "float32", "ab", SALT, "c")
    other = PrefixRoot("smollm2", 16, "float32", "a", SALT, "bc")
    assert one.digest() != other.digest()


@given(st.lists(st.integers(0, 2**32 - 1), max_size=200), st.sampled_from([16, 32, 64]))
def test_an_identity_covers_its_whole_prefix_and_only_full_blocks(tokens: list[int], block_size: int) -> None:
    """A block that matched by its own tokens alone would carry another context's keys and values."""
    root = ROOT.digest()
    whole = chain(root, packed(tokens), block_size)
    assert len(whole) == len(tokens) // block_size
    assert all(len(identity) == DIGEST_BYTES for identity in whole)
    if whole:
        changed = [(tokens[0] + 1) % 2**32, *tokens[1:]]
        assert not set(whole) & set(chain(root, packed(changed), block_size))
        assert chain(whole[0], packed(tokens[block_size:]), block_size) == whole[1:]
