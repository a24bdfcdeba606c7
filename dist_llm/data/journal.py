"""The stores of a build that can be gone on with: now and then all is flushed, and a note beside them says how far it had come.

    note.json          how much of the corpus was taken, and for each split its counts and the hashes of its files up to there
    <split>.digests    16 bytes a document, from which the fingerprint is made

The note is written under another name and renamed, after all that it speaks of is on the disk. What lies behind it is cut off
when a later process goes on, so that the bytes come out as if nobody had stopped.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_llm import faults
from dist_llm.data.sealed import checked, read_small, spell, sync_folder, with_checksum, write_durably
from dist_llm.data.store import SHARD_TOKENS, StoreWriter
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.errors import DataError

KEPT_EVERY = 1 << 22  # tokens between two notes: a few seconds of work
SPLITS = ("train", "validation")


class Stores:
    """The stores of one pass over a corpus, each begun with its first document.

    note: the file to go on from; None: nothing is kept. terms: all that the bytes depend on; a note of other terms, or of
    files that are not as they were, is dropped, and so are the files. documents, tokens, lowest: how many documents of the
    corpus were taken, how many tokens they made, and the smallest fraction among them. weighted: they hold conversations.
    faulty: [where, why, excerpt] of the documents that could not be encoded.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tokenizer: Tokenizer,
        terms: object,
        shard_tokens: int = SHARD_TOKENS,
        weighted: bool = False,
        note: Path | None = None,
    ) -> None:
        self.folder, self.tokenizer, self.shard_tokens, self.note, self.weighted = folder, tokenizer, shard_tokens, note, weighted
        self.faulty: list[list[str]] = []
        self.terms = hashlib.sha256(spell([terms, tokenizer.hash, shard_tokens])).hexdigest()
        self.documents, self.tokens, self.lowest = 0, 0, 1.0
        self._writers: dict[str, StoreWriter] = {}
        self._notes = 0
        if not self._take_up():
            self._writers.clear()
            self._clear()
        self._kept = self.tokens

    def add(
        self,
        split: str,
        batch: Sequence[Sequence[int] | np.ndarray],
        *,
        digests: bytes,
        text_bytes: int,
        weights: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """Append documents to the store of a split."""
        if split not in self._writers:
            self._writers[split] = self._writer(split)
        before = self._writers[split].tokens
        self._writers[split].add(batch, digests=digests, text_bytes=text_bytes, weights=weights)
        self.tokens += self._writers[split].tokens - before

    def keep(self) -> None:
        """Note how far the build has come, when there is enough since the last time."""
        if self.note is None or self.tokens - self._kept < KEPT_EVERY:
            return
        splits = {split: writer.keep() for split, writer in self._writers.items()}
        for folder in (*(writer.folder for writer in self._writers.values()), self.folder):
            sync_folder(folder)
        body = {"terms": self.terms, "documents": self.documents, "tokens": self.tokens, "lowest": self.lowest, "splits": splits}
        body |= {"faulty": self.faulty} if self.faulty else {}
        fresh = self.note.with_suffix(".new")
        write_durably(fresh, with_checksum(body))
        faults.reach("data.note", rank=0, step=self._notes)
        fresh.replace(self.note)
        sync_folder(self.note.parent)
        self._kept, self._notes = self.tokens, self._notes + 1

    def close(self, *, source: str) -> bool:
        """Finish the stores; returns whether there is any."""
        for split, writer in self._writers.items():
            writer.close(split=split, source=source, tokenizer=self.tokenizer.hash)
        return bool(self._writers)

    def _take_up(self) -> bool:
        """Go on from the note, if it is one of ours and everything is as it says."""
        body = self._read_note()
        if body is None:
            return False
        try:
            for split in SPLITS:
                if split in body["splits"]:
                    self._writers[split] = self._writer(split, body["splits"][split])
                else:
                    shutil.rmtree(self.folder / split, ignore_errors=True)
        except (OSError, DataError):
            return False
        self.documents, self.tokens, self.lowest = body["documents"], body["tokens"], body["lowest"]
        self.faulty = body.get("faulty", [])
        return True

    def _read_note(self) -> dict[str, Any] | None:
        try:
            raw = read_small(self.note) if self.note else None
        except OSError:
            return None
        body = None if raw is None else checked(raw)
        return body if body is not None and body.get("terms") == self.terms else None

    def _writer(self, split: str, kept: dict[str, Any] | None = None) -> StoreWriter:
        digests = self._digests(split)
        if digests is not None and kept is None:
            digests.unlink(missing_ok=True)
        vocab, end_id = self.tokenizer.vocab_size, self.tokenizer.end_id
        sizes: dict[str, Any] = {"vocab": vocab, "end_id": end_id, "shard_tokens": self.shard_tokens, "weighted": self.weighted}
        return StoreWriter(self.folder / split, **sizes, digests=digests, kept=kept)

    def _digests(self, split: str) -> Path | None:
        return self.note.parent / f"{split}.digests" if self.note else None

    def _clear(self) -> None:
        """Remove what an earlier pass or a killed build has made."""
        if self.note is not None:
            self.note.unlink(missing_ok=True)
        for split in SPLITS:
            shutil.rmtree(self.folder / split, ignore_errors=True)
