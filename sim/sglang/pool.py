"""Device KV slots as counts: which slot is taken never decides anything in SGLang, only how many are left."""

from __future__ import annotations


class KvPool:
    """Slots for KV tokens, handed out in whole pages (`TokenToKVPoolAllocator`, `PagedTokenToKVPoolAllocator`).

    Attributes:
        size: tokens in all.
        page_size: tokens per page.
        available: free tokens, a multiple of `page_size`.
    """

    __slots__ = ("available", "page_size", "size")

    def __init__(self, size: int, page_size: int) -> None:
        self.size, self.page_size = size, page_size
        self.available = size // page_size * page_size

    def ceil(self, num_tokens: int) -> int:
        """`num_tokens` rounded up to whole pages."""
        return -(-num_tokens // self.page_size) * self.page_size

    def alloc(self, num_tokens: int) -> bool:
        """Take whole pages, `num_tokens` in all; False, and nothing taken, if there are too few."""
        if num_tokens > self.available:
            return False
        self.available -= num_tokens
        return True

    def free(self, num_tokens: int) -> None:
        """Give back whole pages."""
        self.available += num_tokens
