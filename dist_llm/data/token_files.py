"""Token files of other tools as a corpus: their ids become documents of a sealed store, once, without being tokenised again.

`x.idx` and `x.bin` beside each other are Megatron's; a `.bin` alone is a stream (token_stream.py). The streams that one path or
glob names are one line of ids, in the order of their names: llm.c's writers cut documents where a shard is full.

What a store needs is that each document ends in the end token, and that there is none inside. So:

- a document of Megatron's without the end token gets one; one with end tokens inside becomes several;
- in a stream the end token ends a document. Where a file with a head begins with it, it stands before documents, and is moved
  behind them; the last document gets one where it has none;
- a document of more than 2^24 ids, and a stream without any end token, is cut into several. All of it is counted and told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dist_llm.data.binary import require_ids
from dist_llm.data.megatron import open_indexed
from dist_llm.data.readers import Document
from dist_llm.data.token_stream import HEAD, Stream, open_stream
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.errors import UsageError

SUFFIXES = (".bin", ".idx")
LONGEST = 1 << 24  # ids of one document
PIECE = 1 << 16  # ids of one document where the file says nothing about documents
TOLD = {
    "ended": "{count:,} documents did not end in the end token: it was added",
    "split": "{count:,} documents held the end token inside, and were split there",
    "cut": f"{{count:,}} documents were cut off at {LONGEST:,} ids",
    "pieces": f"there is no end token in the ids: they were cut into {{count:,}} documents of {PIECE:,} ids",
    "empty": "{count:,} documents without a single id were left out",
}


def is_tokens(path: Path) -> bool:
    """Whether a name says that the file holds ids."""
    return path.suffix.lower() in SUFFIXES


class TokenFiles:
    """The ids that some files hold. Each pass over `documents` opens, compares and counts anew.

    Raises UsageError when a Megatron index lacks its ids.
    """

    def __init__(self, files: list[Path]) -> None:
        named = {path.with_suffix(".idx") if path.with_suffix(".idx").is_file() else path for path in files}
        self.indexed = sorted(path for path in named if path.suffix.lower() == ".idx")
        self.streams = sorted(named - set(self.indexed))
        self.counts: Counter[str] = Counter()
        for path in self.indexed:
            if not path.with_suffix(".bin").is_file():
                way = f"bring {path.with_suffix('.bin')}, then the same command again"
                expected = f"{path.with_suffix('.bin').name} beside it"
                raise UsageError("a Megatron index without its ids", where=str(path), expected=expected, found="no such file", next=way)

    @property
    def files(self) -> list[Path]:
        """Every file that the ids depend on."""
        return sorted([*self.streams, *self.indexed, *(path.with_suffix(".bin") for path in self.indexed)])

    def notes(self) -> list[str]:
        """What the last pass had to change, in words."""
        return [TOLD[kind].format(count=count) for kind, count in sorted(self.counts.items()) if count]

    def documents(self, tokenizer: Tokenizer) -> Iterator[Document]:
        """The documents as ids without their end tokens. Raises DataError with file, byte, expected and found."""
        self.counts.clear()
        yield from self._of_indexed(tokenizer)
        yield from self._of_streams(tokenizer)

    def _of_indexed(self, tokenizer: Tokenizer) -> Iterator[Document]:
        end = tokenizer.end_id
        for path in self.indexed:
            found = open_indexed(path, path.with_suffix(".bin"))
            for number, (ids, at) in enumerate(found.document_arrays()):
                require_ids(ids, vocab=tokenizer.vocab_size, file=found.data, at=at)
                if not ids.size:
                    self.counts["empty"] += 1
                    continue
                parts = np.split(ids, np.flatnonzero(ids == end) + 1)  # the last has no end token
                self.counts["ended"] += parts[-1].size > 0
                self.counts["split"] += len(parts) > 2
                whole = [part[:-1] for part in parts[:-1]] + ([parts[-1]] if parts[-1].size else [])
                for part in whole:
                    yield from self._cut(part, f"{path}:{number + 1}", (at + ids.nbytes) / max(1, found.data.size))

    def _of_streams(self, tokenizer: Tokenizer) -> Iterator[Document]:
        if not self.streams:
            return
        vocab, end = tokenizer.vocab_size, tokenizer.end_id
        streams = [open_stream(path, vocab=vocab) for path in self.streams]
        if not any((ids == end).any() for stream in streams for ids, _ in stream.blocks(vocab=vocab)):
            yield from self._pieces(streams, vocab)
            return
        yield from self._between(streams, vocab, end, before=streams[0].at == HEAD and streams[0].first == end)

    def _between(self, streams: list[Stream], vocab: int, end: int, *, before: bool) -> Iterator[Document]:
        """The ids between end tokens. before: the end token stands before a document, so the first one says nothing."""
        total, done = sum(stream.count for stream in streams), 0
        rest: list[np.ndarray] = []
        held, first = 0, before
        for stream in streams:
            for ids, at in stream.blocks(vocab=vocab):
                done += ids.size
                for edge in np.split(ids, np.flatnonzero(ids == end) + 1):  # the last has no end token
                    closed = edge.size > 0 and edge[-1] == end
                    if first:  # the end token that the file begins with
                        first = False
                        continue
                    rest.append(edge[:-1] if closed else edge)
                    held += rest[-1].size
                    if closed or held > LONGEST:
                        whole = np.concatenate(rest)
                        cut = whole.size if closed else whole.size // LONGEST * LONGEST
                        yield from self._cut(whole[:cut], f"{stream.file.path}:{at}", done / total)
                        self.counts["cut"] += not closed
                        rest, held = ([], 0) if closed else ([whole[cut:]], whole.size - cut)
        if held or before:
            self.counts["ended"] += not before
            yield from self._cut(np.concatenate([np.empty(0, np.int64), *rest]), f"{streams[-1].file.path}:end", 1.0)

    def _cut(self, ids: np.ndarray, name: str, place: float) -> Iterator[Document]:
        """A document, as several where it is too long."""
        self.counts["cut"] += max(0, -(-ids.size // LONGEST) - 1)
        for first in range(0, max(1, ids.size), LONGEST):
            yield Document("", name, min(1.0, place), ids=ids[first : first + LONGEST])

    def _pieces(self, streams: list[Stream], vocab: int) -> Iterator[Document]:
        """Ids of files without documents, in pieces of one size; the last of a file is shorter."""
        total, done = sum(stream.count for stream in streams), 0
        for stream in streams:
            for ids, at in stream.blocks(vocab=vocab):  # a block is a whole number of pieces
                for first in range(0, ids.size, PIECE):
                    self.counts["pieces"] += 1
                    done += ids[first : first + PIECE].size
                    yield Document("", f"{stream.file.path}:{at}", done / total, ids=ids[first : first + PIECE])
