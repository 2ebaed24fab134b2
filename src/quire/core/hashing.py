"""Chained hashes of token blocks: the name of a prefix. Knows tokens and salts, not blocks.

The hash of block j covers every token up to its end, the salt of its owner and the multimodal items that reach into it,
so equal hashes mean equal KV content. BLAKE2b with 16 bytes: a collision cannot be made on purpose, so one user's
prompt never reads another's cache.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

from quire.types.request import Request


def root_hash(request: Request) -> bytes:
    """Where the chain of a request starts: its cache salt and LoRA adapter."""
    return blake2b(f"{request.lora_id}/{request.cache_salt}".encode(), digest_size=16).digest()


def extend_hashes(
    hashes: list[bytes], root: bytes, tokens: list[int], upto: int, block_size: int, request: Request
) -> None:
    """Append to `hashes` (one a full block) until the blocks that end at or before token `upto` are covered."""
    known, stop = len(hashes), upto // block_size
    numbers = array("i", tokens[known * block_size : stop * block_size]).tobytes()
    size = len(numbers) // max(1, stop - known)  # bytes of a block
    parent = hashes[-1] if hashes else root
    for j in range(known, stop):
        start, end = j * block_size, (j + 1) * block_size
        content = parent + numbers[(j - known) * size : (j - known + 1) * size]
        for at, length, digest in request.item_hashes:
            if at < end and at + length > start:
                content += digest + (at - start).to_bytes(8, "little", signed=True)
        parent = blake2b(content, digest_size=16).digest()
        hashes.append(parent)
