"""From documents to ids: of text as it is, of conversations through their template, with a weight for each token."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dist_llm.data.chat import TrainOn, conversation_of, key_of, said
from dist_llm.data.readers import BadLines, Document
from dist_llm.data.templates import Template, Trained
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.errors import DataError


@dataclass(frozen=True)
class Ids:
    """A document as ids, its digest, its place for the split in [0, 1), its bytes of text.

    weights: of each id in the loss, in a conversation; None: of a text, whose end token the store adds. second: of a pair, the place
    of the first id of its rejected side; each side is a document of the store.
    """

    ids: Sequence[int] | np.ndarray
    digest: bytes
    fraction: float
    text_bytes: int
    weights: list[float] | None = None
    second: int | None = None

    @property
    def sides(self) -> list[tuple[Sequence[int] | np.ndarray, list[float] | None]]:
        """(ids, weights) of each document of a store that it becomes."""
        if self.second is None or self.weights is None:
            return [(self.ids, self.weights)]
        return [(self.ids[part], self.weights[part]) for part in (slice(self.second), slice(self.second, None))]


class Encoder(Protocol):
    """Makes ids of documents. weighted: with weights. identity: what the ids depend on besides the tokenizer."""

    tokenizer: Tokenizer
    weighted: bool
    identity: tuple[object, ...]

    def encode(self, documents: Sequence[Document], *, limit: int | None = None) -> list[Ids | None]:
        """Each document; None for one that is left out. limit: tokens that they may make together, with the ends that the store adds."""


class TextEncoder:
    """Texts as they are, and documents that come as ids; the last one is cut where the limit is reached."""

    weighted: bool = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.before = tokenizer, tokenizer.before_documents
        self.identity: tuple[object, ...] = (*self.before,)

    def encode(self, documents: Sequence[Document], *, limit: int | None = None) -> list[Ids | None]:
        """Each document; None for one without text, or after the limit."""
        found: list[Ids | None] = []
        tokens = 0
        texts = iter(self.tokenizer.encode_batch([document.text for document in documents if document.ids is None]))
        for document in documents:
            ids: Sequence[int] | np.ndarray = self._begun(next(texts)) if document.ids is None else document.ids
            kept = ids if limit is None else ids[: max(0, limit - tokens - 1)]
            ended = document.ids is not None and not len(ids) and (limit is None or tokens < limit)
            some = len(kept) > 0 or ended  # an end token alone, where others have written one
            tokens += len(kept) + 1 if some else 0
            found.append(Ids(kept, *identify(document), len(document.text.encode())) if some else None)
        return found

    def _begun(self, ids: list[int]) -> list[int]:
        """The ids of a text with what stands before it; none of an empty one."""
        return [*self.before, *ids] if ids else ids


class ChatEncoder:
    """Conversations through a template. bad: takes those that cannot be encoded, and raises DataError where they are too many."""

    weighted: bool = True

    def __init__(self, template: Template, tokenizer: Tokenizer, *, train_on: TrainOn, bad: BadLines) -> None:
        self.template, self.tokenizer, self.bad = template, tokenizer, bad
        self.train_on: Trained = "last" if train_on == "each" else train_on  # a document ends with the turn that is trained
        self.identity: tuple[object, ...] = (template.hash, train_on, *tokenizer.before_documents)
        self.faulty: list[list[str]] = []  # of the last call: where, why, excerpt
        self.full = False  # the limit was reached

    def encode(self, documents: Sequence[Document], *, limit: int | None = None) -> list[Ids | None]:
        """Each conversation whole; None for one that cannot be encoded, or that would go over the limit, and for all after that."""
        self.faulty.clear()
        found: list[Ids | None] = []
        tokens = 0
        for document in documents:
            one = None if self.full else self._encoded(document)
            if one is not None and limit is not None and tokens + len(one.ids) > limit:
                one, self.full = None, True
            tokens += len(one.ids) if one else 0
            found.append(one)
        return found

    def _encoded(self, document: Document) -> Ids | None:
        messages, tools = conversation_of(document.text)
        if messages[0]["role"] == "text":
            weight = messages[0].get("weight", 1.0)
            text = self.tokenizer.encode(messages[0]["content"])
            ids = [*self.tokenizer.before_documents, *text, self.tokenizer.end_id]
            weights = [0.0] + [weight] * (len(ids) - 1)
            fault = None if any(weights) else "no token of the text is trained"
        else:
            encoded = self.template.encode_batch([messages], self.tokenizer, train_on=self.train_on, tools=tools)[0]
            if isinstance(encoded, DataError):
                ids, weights, fault = [], [], encoded.what + (f" ({encoded.found})" if encoded.found else "")
            else:
                ids, weights, fault = encoded.ids, encoded.weights, None
        if fault:
            self.note_bad(document, fault, messages)
            return None
        digest = hashlib.blake2b(np.array(ids, "<i8").tobytes() + np.array(weights, "<f8").tobytes(), digest_size=16).digest()
        text_bytes = sum(len(text.encode()) for text in said(messages, tools))
        return Ids(ids, digest, place_of(document.key or key_of(document.text)), text_bytes, weights)

    def note_bad(self, document: Document, fault: str, messages: Sequence[dict[str, Any]]) -> None:
        """Notes what cannot be encoded. Raises DataError when it is too much."""
        excerpt = "\n".join(said(messages[-1:]))[:200]
        self.faulty.append([document.name, fault, excerpt])
        self.bad.add(document.name, fault, excerpt.encode())


def identify(document: Document) -> tuple[bytes, float]:
    """16 bytes that stand for the text or the ids, and where in [0, 1) the document falls for the split."""
    content = document.text.encode() if document.ids is None else document.ids.astype("<u4").tobytes()
    digest = hashlib.blake2b(content, digest_size=16).digest()
    if document.key is None and document.ids is not None:
        return digest, int.from_bytes(digest[:6], "big") / 2**48
    return digest, place_of(document.text if document.key is None else document.key)


def place_of(key: str) -> float:
    """Where in [0, 1) a document with such a key falls."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=16).digest()[:6], "big") / 2**48
