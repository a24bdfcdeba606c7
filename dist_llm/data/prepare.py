"""From a config's data section to a tokenizer and token stores: built once, found again by a fingerprint.

    <dir>/<name>-bpe<vocab>-<key>/    a trained tokenizer
    <dir>/<name>-<key>/               tokenizer.json, train/ and validation/: one store each; skipped.json: lines left out

Each has a seal that lists its files (sealed.py), and appears complete or not at all (publish.py): a build that is killed
leaves nothing under the final name, the next one goes on from there, and of two at once the second finds the work of the first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from dist_llm.data.build import Progress, build_store, no_text, sample
from dist_llm.data.chat import EXPECTED, Reading, spoken
from dist_llm.data.corpora import Corpus, open_corpus
from dist_llm.data.encoding import ChatEncoder, TextEncoder
from dist_llm.data.entropy import entropy_rate
from dist_llm.data.mixture import whole_weights
from dist_llm.data.preferences import PairEncoder
from dist_llm.data.publish import NOTE, publish
from dist_llm.data.readers import BadLines
from dist_llm.data.sealed import check_seal, read_file, seal, write_durably
from dist_llm.data.skills import mixture_of
from dist_llm.data.store import MANIFEST, TokenStore
from dist_llm.data.template_files import choose_template
from dist_llm.data.templates import Template
from dist_llm.data.tokenizer import END, Tokenizer, bytes_tokenizer, ids_tokenizer, load, train_bpe
from dist_llm.errors import SpaceError, UsageError

if TYPE_CHECKING:
    from dist_llm.config.schema import ChatConfig, DataConfig

FORMAT = 2  # of what lies in <dir>; older folders are not found again
TRAINED_ON = 4_000_000  # bytes of text that a BPE is trained on
BYTES_PER_TOKEN = 8  # more than a BPE reaches: it is trained on no more text than max_tokens can hold
DEFAULT_VOCAB = 2048
SKIPPED = "skipped.json"
TOKENIZER_PART = 0.25  # of the whole work, for progress


@dataclass(frozen=True)
class Prepared:
    """Tokens ready to train on: one store for each source of the mixture, and each one's share as a whole number.

    validation: stores of the documents held out, with their shares; empty when there are none. entropy_rate: nats per
    token below which no loss can fall, where the source is known (`entropy` with the byte tokenizer). built: whether
    this call wrote anything. notes: what a user should know. template, shapes: of conversations, and of each source's objects.
    plain, added: the hash of the tokenizer before the template made tokens special, and those of them that are new. ids: whether some
    stores were ids when they came.
    base, beside: the identity of the weights that the run begins with, and the files that are carried along with them.
    base_weights: under an adapter, what tells them from others in any form.
    """

    tokenizer: Tokenizer
    train: tuple[TokenStore, ...]
    weights: tuple[int, ...]
    validation: tuple[TokenStore, ...] = ()
    validation_weights: tuple[int, ...] = ()
    entropy_rate: float | None = None
    built: bool = False
    notes: tuple[str, ...] = ()
    template: Template | None = None
    shapes: tuple[str, ...] = ()
    plain: str = ""
    added: tuple[str, ...] = ()
    ids: bool = False
    base: str | None = None
    base_weights: str | None = None
    beside: dict[str, bytes] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """sha256 of what was made: equal on every rank, or they train on different data."""
        parts = [store.manifest.fingerprint for store in (*self.train, *self.validation)]
        return hashlib.sha256(json.dumps([self.tokenizer.hash, self.weights, parts]).encode()).hexdigest()

    def require_vocab(self, vocab: int, *, given: bool = False) -> None:
        """Raises UsageError when a model with `vocab` embeddings cannot read these tokens.

        given: it is a base's, with the rows that it has; then those are enough that text and template need.
        """
        needed = self.tokenizer.vocab_size
        if given and not self.ids:
            needed = self.tokenizer.rows(self.template.commands(self.tokenizer) if self.template else ())
        if vocab < needed:
            what = "the model's vocabulary is smaller than the tokenizer's"
            way = f"the same command with model.vocab={needed}"
            if self.template is not None:
                way += "; of a base model that has no rows to spare, data.chat.template=plain needs no further tokens"
            raise UsageError(what, where="model.vocab", expected=f"at least {needed}", found=str(vocab), next=way)


@dataclass
class _Work:
    """What one call of `prepare` carries along."""

    folder: Path
    progress: Progress
    bad: BadLines
    chat: ChatConfig | None = None
    template: Template | None = None
    plain: str = ""
    added: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    built: bool = False


def prepare(
    data: DataConfig, *, seed: int, progress: Progress | None = None, max_bad_lines: int | None = None, verify: bool | None = None
) -> Prepared:
    """Read the data section; build the tokenizer and the stores, or find them again.

    seed: of the generated corpora, unless data.seed is given. max_bad_lines: of JSON, skipped and listed in the notes; as
    data.max_bad_lines says where None. What an earlier call has built with more of them skipped is found again, and the
    notes say so. verify: what is compared with its hash now, as for a TokenStore; the rest is when it is first read. Safe to
    call from several processes at once. Raises UsageError, DataError, or SpaceError when the folder cannot be written.
    """
    bad = BadLines(data.max_bad_lines if max_bad_lines is None else max_bad_lines)
    chat = data.chat if data.chat.format is not None else None
    work = _Work(Path(data.dir).expanduser(), progress or (lambda message, fraction: None), bad, chat)
    reading = Reading(data.chat.format, data.chat.train_on) if data.chat.format is not None else None
    bad.expected = bad.expected if reading is None else EXPECTED
    seed = seed if data.seed is None else data.seed
    sources = [(item.source, item.weight) for item in data.mix] if data.mix else [(data.source, 1.0)]
    weights = whole_weights([weight for _, weight in sources])
    how: dict[str, Any] = {"seed": seed, "text_key": data.text_key, "bad": work.bad, "reading": reading, "home": work.folder}
    how["mixture"] = mixture_of(data.skills)
    try:
        corpora = [open_corpus(source, **how) for source, _ in sources]
        tokenizer = _tokenizer(data, corpora, weights, work)
        homes = []
        for number, (corpus, weight) in enumerate(zip(corpora, weights, strict=True)):
            limit = data.max_tokens and max(2, -(-data.max_tokens * weight // sum(weights)))
            tell = _part(work.progress, number, len(corpora))
            homes.append(_store(corpus, tokenizer, validation=data.validation, max_tokens=limit, tell=tell, work=work))
    except OSError as error:
        raise SpaceError(
            "the data folder cannot be written",
            where=str(work.folder),
            expected="a folder that can be written",
            next="the same command with data.dir=DIR",
            found=error.strerror or str(error),
        ) from error
    known = data.source == "entropy" and not data.mix and data.tokenizer.kind == "bytes"
    held_out = [(home / "validation", weight) for (home, splits), weight in zip(homes, weights, strict=True) if "validation" in splits]
    return Prepared(
        tokenizer=tokenizer,
        train=tuple(TokenStore(home / "train", tokenizer=tokenizer.hash, verify=verify) for home, _ in homes),
        weights=tuple(weights),
        validation=tuple(TokenStore(home, tokenizer=tokenizer.hash, verify=verify) for home, _ in held_out),
        validation_weights=tuple(weight for _, weight in held_out),
        entropy_rate=entropy_rate(seed) if known else None,
        built=work.built,
        notes=(*(note for corpus in corpora for note in corpus.notes), *work.notes, *_skipped(work.bad)),
        template=work.template,
        shapes=tuple(corpus.shape for corpus in corpora),
        plain=work.plain or tokenizer.hash,
        added=work.added,
        ids=any(corpus.tokens is not None for corpus in corpora),
    )


def _tokenizer(data: DataConfig, corpora: Sequence[Corpus], weights: Sequence[int], work: _Work) -> Tokenizer:
    """The tokenizer that the config asks for, trained when it has to be, with the special tokens that a template writes."""
    wanted = data.tokenizer
    path = Path(str(wanted.path)).expanduser() if wanted.kind == "file" and wanted.path is not None else None
    if work.chat is None:
        return _plain_tokenizer(data, corpora, weights, work)
    if wanted.kind != "file":
        work.template = choose_template(work.chat.template, end=END)
    tokenizer = _plain_tokenizer(data, corpora, weights, work)
    names: dict[str, str] = {"end": tokenizer.end, "begin": tokenizer.begin_names}
    template = work.template = work.template or choose_template(work.chat.template, **names, tokenizer=path)
    fitted = template.fit(tokenizer)
    work.plain, work.added = tokenizer.hash, tuple(sorted(fitted.added - tokenizer.added))
    if work.added:
        what = f"{len(work.added)} special tokens, {' '.join(work.added)}"
        work.notes.append(f"the template {template.name} added {what}: the vocabulary is {fitted.vocab_size} now")
    if work.chat.template == "auto" and path is not None and not template.models:
        work.notes.append(f"no chat template lies beside the tokenizer: {template.name} is used")
    template.require_end(fitted)
    if fitted is tokenizer:
        fitted = Tokenizer(tokenizer.inner, end=tokenizer.end)
    fitted.chat_template, fitted.bos = template.text, template.bos
    return fitted


def _plain_tokenizer(data: DataConfig, corpora: Sequence[Corpus], weights: Sequence[int], work: _Work) -> Tokenizer:
    """The tokenizer before a template adds to it."""
    wanted = data.tokenizer
    _require_fit(wanted.kind, corpora)
    if wanted.kind == "bpe":
        budget = TRAINED_ON if data.max_tokens is None else min(TRAINED_ON, BYTES_PER_TOKEN * data.max_tokens)
        budgets = [max(1, budget * weight // sum(weights)) for weight in weights]
        return _trained(wanted.vocab or DEFAULT_VOCAB, corpora, budgets, work)
    if wanted.kind == "file" and wanted.path is None:
        raise UsageError("a tokenizer of kind file needs its path", where="data.tokenizer.path", expected="a path", found="null")
    if wanted.kind == "ids":
        if wanted.vocab is None or wanted.end is None or wanted.end >= wanted.vocab:
            found = f"vocab {wanted.vocab}, end {wanted.end}"
            expected = "the number of ids, and the one of them that ends a document"
            raise UsageError("a tokenizer of kind ids needs two numbers", where="data.tokenizer", expected=expected, found=found)
        return ids_tokenizer(wanted.vocab, end=wanted.end)
    tokenizer = load(Path(str(wanted.path)).expanduser()) if wanted.kind == "file" else bytes_tokenizer()
    if wanted.vocab not in (None, tokenizer.vocab_size):
        what, expected = "the tokenizer has another vocabulary than the config says", str(tokenizer.vocab_size)
        raise UsageError(
            what,
            where="data.tokenizer.vocab",
            expected=expected,
            found=str(wanted.vocab),
            next=f"the same command with data.tokenizer.vocab={expected}",
        )
    return tokenizer


def _require_fit(kind: str, corpora: Sequence[Corpus]) -> None:
    """Raises UsageError where ids are to be given a new tokenizer, or text one that knows none."""
    for corpus in corpora:
        if kind == "bpe" and corpus.tokens is not None:
            what, expected = "token files come with the tokenizer that has made them", "kind file, or ids where it is not at hand"
            way = "the same command with data.tokenizer.kind=file data.tokenizer.path=PATH; or kind=ids, vocab=N and end=ID"
            raise UsageError(what, where="data.tokenizer.kind", expected=expected, found=f"bpe, for {corpus.place}", next=way)
        if kind == "ids" and corpus.tokens is None:
            what, expected = "a tokenizer of kind ids knows no text", "kind bpe, bytes or file for text"
            found, way = (
                f"ids, for {corpus.place or corpus.name}",
                "the same command with data.tokenizer.kind=bpe data.tokenizer.vocab=null data.tokenizer.end=null",
            )
            raise UsageError(what, where="data.tokenizer.kind", expected=expected, found=found, next=way)


def _trained(vocab: int, corpora: Sequence[Corpus], budgets: Sequence[int], work: _Work) -> Tokenizer:
    """A BPE of the corpora, each giving its budget of bytes."""
    name = "-".join(dict.fromkeys(corpus.name for corpus in corpora))[:48]
    special = work.template.special if work.template else ()
    identity = [FORMAT, [corpus.identity for corpus in corpora], list(budgets), vocab, tokenizers.__version__]
    identity += [list(special)] if special else []

    def make(target: Path) -> None:
        work.progress(f"training a BPE of {vocab:,} tokens on {name}", 0.0)
        samples = (sample(corpus, budget) for corpus, budget in zip(corpora, budgets, strict=True))
        texts = [spoken(document.text) if work.chat else document.text for documents in samples for document in documents]
        if not texts:
            raise no_text(*corpora)
        train_bpe(texts, vocab=vocab, special=special).save(target)
        seal(target, key=key)

    key = _key(identity)
    home = work.folder / f"{name}-bpe{vocab}-{key}"
    work.built |= publish(home, make, waiting=lambda: work.progress(f"waiting for another process that makes {home.name}", 0.0))
    check_seal(home, key=key)
    tokenizer = load(home)
    if tokenizer.vocab_size < vocab:
        work.notes.append(f"the text gives a BPE of {tokenizer.vocab_size} tokens, not {vocab}")
    return tokenizer


def _store(
    corpus: Corpus, tokenizer: Tokenizer, *, validation: float, max_tokens: int | None, tell: Progress, work: _Work
) -> tuple[Path, set[str]]:
    """The folder of one corpus' stores, built when it is not there yet, and the names of its splits."""
    encoder: TextEncoder | ChatEncoder = TextEncoder(tokenizer)
    if work.chat is not None and work.template is not None:
        kind = PairEncoder if work.chat.format == "preference" else ChatEncoder
        encoder = kind(work.template, tokenizer, train_on=work.chat.train_on, bad=work.bad)

    def make(target: Path) -> None:
        work.bad.met.clear()
        note = target.parent / NOTE
        work.notes += build_store(corpus, encoder, target, validation=validation, max_tokens=max_tokens, progress=tell, note=note)
        tokenizer.save(target)
        if work.bad.met:
            write_durably(target / SKIPPED, json.dumps(sorted(work.bad.met), indent=0).encode())
        seal(target, key=key)

    key = _key([FORMAT, corpus.identity, tokenizer.hash, validation, max_tokens, *encoder.identity])
    home = work.folder / f"{corpus.name}-{key}"
    built = publish(home, make, waiting=lambda: tell(f"waiting for another process that builds {home.name}", 0.0))
    files = check_seal(home, key=key)
    if not built and SKIPPED in files:
        count = len(json.loads(read_file(home / SKIPPED, home=home)))
        what = f"{count} bad {work.bad.word}{'' if count == 1 else 's'} of {corpus.name}"
        work.notes.append(f"{what} were skipped when it was built: {home / SKIPPED}")
    work.built |= built
    return home, {name.removesuffix(f"/{MANIFEST}") for name in files if name.endswith(f"/{MANIFEST}")}


def _part(progress: Progress, number: int, count: int) -> Progress:
    """Progress of store `number` of `count`, told as a fraction of the whole work."""
    width = (1.0 - TOKENIZER_PART) / count
    return lambda message, fraction: progress(message, TOKENIZER_PART + width * (number + min(1.0, fraction)))


def _key(identity: object) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def _skipped(bad: BadLines) -> list[str]:
    """What was left out of the text, in words."""
    blank = sum(bad.blank.values())
    notes = [f"{blank} {bad.word}{'' if blank == 1 else 's'} without text were left out"] if blank else []
    return [f"{bad.count} bad {bad.word}s were skipped", *bad.told, *notes] if bad.count else notes
