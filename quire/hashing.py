r"""Identity of KV blocks: one definition for every process and version.

The identity of a full block is a chained digest over everything that determines its keys and values:

    root        = H("quire/prefix/1\0" || len(field) as u32 LE || field ... for the fields of `PrefixRoot`)
    identity[0] = H(root        || tokens[0 : block_size] as u32 LE)
    identity[i] = H(identity[i - 1] || tokens[i * block_size : (i + 1) * block_size] as u32 LE)

A block whose identity covers more than its tokens, `extra` (`quire.media.block_extras`), is chained to
H'(identity[i - 1] || extra) in place of identity[i - 1], where H' is H with the person "quire-extra".

H is BLAKE2b with a digest of 16 bytes. The format version is in the root: a change of it never matches old blocks.
"""

from collections.abc import Callable, Mapping
import dataclasses
import hashlib
import struct

from quire import native

DIGEST_BYTES = 16
_FORMAT = b"quire/prefix/1\0"
_TOKEN_BYTES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class PrefixRoot:
    """What the first block of a sequence is chained to. Sequences with different roots never share a block."""

    model_id: str
    """Name of the model."""
    block_size: int
    """Tokens in a block."""
    kv_dtype: str
    """Element type of the cache."""
    adapter: str
    """Adapter whose weights take part, empty for none."""
    tenant_salt: bytes
    """Secret of the tenant, derived by the server (`tenant_salt`)."""
    cache_salt: str
    """Further separation that the client asked for, empty for none."""

    def digest(self) -> bytes:
        """Returns the 16-byte root digest."""
        hasher = hashlib.blake2b(_FORMAT, digest_size=DIGEST_BYTES)
        fields = (
            self.model_id.encode(),
            struct.pack("<I", self.block_size),
            self.kv_dtype.encode(),
            self.adapter.encode(),
            self.tenant_salt,
            self.cache_salt.encode(),
        )
        for field in fields:
            hasher.update(struct.pack("<I", len(field)))
            hasher.update(field)
        return hasher.digest()


def tenant_salt(secret: bytes, tenant: str) -> bytes:
    """Returns the 16-byte salt of a tenant, keyed with the server's secret (16 .. 64 bytes) that no client sees."""
    return hashlib.blake2b(tenant.encode(), digest_size=DIGEST_BYTES, key=secret, person=b"quire-tenant").digest()


def chain(parent: bytes, tokens: bytes | memoryview, block_size: int) -> list[bytes]:
    """Returns the identities of the full blocks in `tokens`.

    Args:
        parent: identity of the block before, or the root digest.
        tokens: token ids as packed little-endian u32; a partial last block is ignored.
        block_size: tokens in a block.
    """
    stride = block_size * _TOKEN_BYTES
    if native.accelerator is not None:
        return native.accelerator.chain(parent, tokens, stride)
    blake2b, size = hashlib.blake2b, DIGEST_BYTES
    identities = []
    data = bytes(tokens)
    for start in range(0, len(data) - stride + 1, stride):
        parent = blake2b(parent + data[start : start + stride], digest_size=size).digest()
        identities.append(parent)
    return identities


def chain_with(
    parent: bytes,
    tokens: bytes | memoryview,
    block_size: int,
    first: int,
    extras: Mapping[int, bytes],
    link: Callable[[bytes, bytes | memoryview, int], list[bytes]] = chain,
) -> list[bytes]:
    """Returns the identities of the full blocks in `tokens`, some of which cover more than their tokens.

    Args:
        parent: as in `chain`.
        tokens: as in `chain`.
        block_size: tokens in a block.
        first: position of the first block in its sequence.
        extras: what the identity of a block covers beside its tokens, by position of the block.
        link: computes the identities of blocks that follow one another.
    """
    stride = block_size * _TOKEN_BYTES
    last = first + len(tokens) // stride
    identities: list[bytes] = []
    start = first
    # Runs of plain blocks are chained at once; a block with an extra begins one.
    for stop in [*sorted(index for index in extras if first < index < last), last]:
        parent = with_extra(parent, extras.get(start, b""))
        identities += link(parent, tokens[(start - first) * stride : (stop - first) * stride], block_size)
        start, parent = stop, identities[-1] if identities else parent
    return identities


def each(parents: list[bytes], data: bytes, stride: int) -> list[bytes]:
    """Returns the identities of blocks of `stride` bytes, one after the other, each with its own parent."""
    if native.accelerator is not None:
        return native.accelerator.each(parents, data, stride)
    blake2b, size = hashlib.blake2b, DIGEST_BYTES
    starts = range(0, len(data), stride)
    return [
        blake2b(parent + data[start : start + stride], digest_size=size).digest()
        for parent, start in zip(parents, starts, strict=True)
    ]


def with_extra(parent: bytes, extra: bytes) -> bytes:
    """Returns the digest to chain a block to whose identity covers `extra` beside its tokens; `parent` without any."""
    return (
        hashlib.blake2b(parent + extra, digest_size=DIGEST_BYTES, person=b"quire-extra").digest() if extra else parent
    )
