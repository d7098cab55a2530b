"""The pages of an LMDB file, read without the LMDB library: where the value of each key lies, checked on the way.

The library maps a file into memory and follows whatever is written there: one flipped bit in a page ends the process
(SIGBUS). Here every number is checked before it is used, a page is read once, and all goes through `os.pread`, which
processes may do with a common file. The layout is that of LMDB 0.9 (``mdb.c``: data version 1, little-endian, 64 bits), of
which what a reader of one table without duplicate keys meets.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from ndem_zoo.errors import FileFormatError

_MAGIC, _VERSION = 0xBEEFC0DE, 1

#: A page: number, padding, kind, end of the list of nodes, begin of the nodes (or, in a long value, its pages).
_HEADER = struct.Struct("<QHHHH")

#: Behind the header of a meta page: magic, version, address, size of the map; then two tables, last page, transaction.
_META = struct.Struct("<IIQQ")

#: A table: size of pages (in the first one), flags, depth, pages of three kinds, entries, number of the root.
_TABLE = struct.Struct("<IHHQQQQQ")

#: A node: low and high half of a size, flags, length of the key; in a branch the first three are a page number.
_NODE = struct.Struct("<HHHH")

_BRANCH, _LEAF, _OVERFLOW = 0x01, 0x02, 0x04

#: Flag of a node whose value has pages of its own; no others are allowed.
_IS_LONG = 0x01

_NOWHERE = 2**64 - 1

#: Bound of the library itself.
_DEEPEST = 32


class Place(NamedTuple):
    """Where a value lies in the file: its first byte, and how many there are."""

    start: int
    size: int


class PagedFile:
    """An open LMDB file.

    Parameters
    ----------
    handle
        Of the open file.

    Raises
    ------
    FileFormatError
        If it is no such file or damaged; the message goes on after the name of the file.
    """

    def __init__(self, handle: int) -> None:
        self.handle, self.size = handle, os.fstat(handle).st_size
        metas = [meta for meta in (self._meta(0), self._second_meta()) if meta is not None]
        if not metas:
            raise FileFormatError("is damaged or no LMDB file (neither of its first two pages says so)")
        self.transaction, self.page_size, self.last, self.entries, self.depth, self.root = max(metas)
        needed = (self.last + 1) * self.page_size
        if self.size < needed:
            raise FileFormatError(f"is truncated: it has {self.size:,} bytes of {needed:,}")

    def _meta(self, start: int) -> tuple[int, ...] | None:
        """Transaction, size of pages, last page, entries, depth and root that a meta page states; None if it is none."""
        page = os.pread(self.handle, 152, start)
        if len(page) < 152 or _META.unpack_from(page, 16)[:2] != (_MAGIC, _VERSION):
            return None
        page_size = _TABLE.unpack_from(page, 40)[0]
        _, flags, depth, *_, entries, root = _TABLE.unpack_from(page, 88)
        last, transaction = struct.unpack_from("<QQ", page, 136)
        if flags or page_size < 512 or page_size > 65536 or page_size & (page_size - 1):
            return None
        return transaction, page_size, last, entries, depth, root

    def _second_meta(self) -> tuple[int, ...] | None:
        """The second page is a meta page, too; how long the first is, only the first or a guess can say."""
        first = self._meta(0)
        sizes = [first[1]] if first else [1 << power for power in range(9, 17)]
        return next((meta for size in sizes if (meta := self._meta(size)) is not None and meta[1] == size), None)

    def read(self, place: Place) -> bytes:
        """The value at a place."""
        value = os.pread(self.handle, place.size, place.start)
        if len(value) != place.size:
            raise FileFormatError(f"is truncated: a value of {place.size:,} bytes lies behind its end")
        return value

    def places(self) -> Iterator[tuple[bytes, Place]]:
        """Keys and the places of their values, in the order of the keys' bytes.

        Raises
        ------
        FileFormatError
            If pages do not fit together, keys are out of order, or there are not as many as the file says.
        """
        found, before = 0, None
        for key, place in self._below(self.root, self.depth) if self.root != _NOWHERE else ():
            if before is not None and key <= before:
                raise FileFormatError("is damaged: its keys are out of order")
            found, before = found + 1, key
            yield key, place
        if found != self.entries:
            raise FileFormatError(f"is damaged: it says that it has {self.entries} keys; it has {found}")

    def _below(self, number: int, depth: int) -> Iterator[tuple[bytes, Place]]:
        """Keys and places in the tree of a page; all leaves are equally deep, which also ends circles."""
        if not 0 < depth <= _DEEPEST:
            raise FileFormatError(f"is damaged: page {number} is deeper in its tree than the file says")
        page, nodes = self._nodes(number, _LEAF if depth == 1 else _BRANCH)
        for start in nodes:
            low, high, flags, length = _NODE.unpack_from(page, start)
            if depth > 1:
                yield from self._below(low | high << 16 | flags << 32, depth - 1)
                continue
            first = start + _NODE.size + length
            if not length or first > len(page):
                raise FileFormatError(f"is damaged: a key in page {number} has {length} bytes")
            yield page[first - length : first], self._place(number, page, first, low | high << 16, flags)

    def _place(self, number: int, page: bytes, first: int, size: int, flags: int) -> Place:
        """Where the value of a node lies, which begins at `first` or has pages of its own."""
        if flags not in (0, _IS_LONG) or first + (8 if flags else size) > len(page):
            raise FileFormatError(f"is damaged: a value in page {number} has {size} bytes and flags {flags:#x}")
        if not flags:
            return Place(number * self.page_size + first, size)
        (own,) = struct.unpack_from("<Q", page, first)
        header = self._header(own)
        pages = header[3] | header[4] << 16
        if header[2] != _OVERFLOW or own + pages - 1 > self.last or pages * self.page_size < _HEADER.size + size:
            raise FileFormatError(f"is damaged: page {own} is not the value of {size} bytes that page {number} says")
        return Place(own * self.page_size + _HEADER.size, size)

    def _header(self, number: int, page: bytes | None = None) -> tuple[int, ...]:
        """Header of a page, which must be there and know its own number."""
        if not 2 <= number <= self.last:
            raise FileFormatError(f"is damaged: it refers to page {number}; there are 2 to {self.last}")
        raw = page if page is not None else os.pread(self.handle, _HEADER.size, number * self.page_size)
        header = _HEADER.unpack_from(raw)
        if header[0] != number:
            raise FileFormatError(f"is damaged: its page {number} calls itself {header[0]}")
        return header

    def _nodes(self, number: int, kind: int) -> tuple[bytes, tuple[int, ...]]:
        """A page of a tree, and where its nodes begin."""
        page = os.pread(self.handle, self.page_size, number * self.page_size) if 2 <= number <= self.last else None
        _, _, found, lower, upper = self._header(number, page)
        if found != kind or lower < _HEADER.size or lower % 2 or not lower <= upper <= self.page_size:
            raise FileFormatError(
                f"is damaged: page {number} is not the {'leaf' if kind == _LEAF else 'branch'} it should be"
            )
        starts = struct.unpack_from(f"<{(lower - _HEADER.size) // 2}H", page, _HEADER.size)
        if any(start < upper or start + _NODE.size > self.page_size for start in starts):
            raise FileFormatError(f"is damaged: a node of page {number} lies outside of it")
        return page, starts
