"""Text to token ids and back: a trained byte-level BPE, any tokenizer.json, plain bytes, or bare ids, all behind one class.

Every tokenizer here is one of the `tokenizers` library, bytes too, so that each can be saved as a tokenizer.json that
others read. Text never yields the end token: `<|endoftext|>` inside a document is encoded as the letters it is made of.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from dist_llm.data.sealed import write_durably
from dist_llm.errors import CheckpointError, DataError, UsageError, plain
from dist_llm.sidefiles import SLOW_TOKENIZER_FILES, TOKENIZER_FILES, read_beside

END = "<|endoftext|>"
KNOWN_ENDS = (END, "<|end_of_text|>", "</s>", "<|eot_id|>", "<eos>", "<|im_end|>", "[SEP]", "<|end|>")
LARGEST_FILE = 256 << 20  # bytes of a tokenizer.json
NO_WORD = re.compile(r"[<>|｜/\[\]]")  # what names of special tokens are set off with
SMALLEST_BPE = 257  # every byte, and the end


class Tokenizer:
    """A vocabulary with its rules, and the token that ends a document.

    vocab_size: one more than the largest id. end_id: the end token. begin: ids that its own rule puts before a text, mostly none or BOS.
    hash: sha256 of the canonical JSON. beside: the files it was read from, and those of a chat template and the like that lay beside
    them: carried along as they are.
    """

    def __init__(self, inner: tokenizers.Tokenizer, *, end: str = END, beside: dict[str, bytes] | None = None) -> None:
        inner.no_padding()
        inner.no_truncation()
        inner.encode_special_tokens = True  # special tokens in a text are letters, not commands
        end_id = inner.token_to_id(end)
        assert end_id is not None, end
        self.inner, self.end, self.end_id, self.beside = inner, end, end_id, beside or {}
        self.chat_template, self.bos = "", ""  # what its files say of conversations; no part of what it is
        self.begin = _begin(inner)
        self.vocab_size = 1 + max(inner.get_vocab(with_added_tokens=True).values())

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without any special token."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all threads the library has."""
        return [encoding.ids for encoding in self.inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def prompt(self, text: str) -> list[int]:
        """The ids of a text that is to go on, as models of this tokenizer have read texts; of an empty one `opening`."""
        return [*self.begin, *self.encode(text)] or self.opening

    @property
    def opening(self) -> list[int]:
        """The ids after which a new text begins: its own rule's, or the end of the one before."""
        return [*self.begin] or [self.end_id]

    @property
    def before_documents(self) -> list[int]:
        """The ids before each document that is trained: its own rule's, but where they are the end, which stands there already."""
        return [] if self.end_id in self.begin else [*self.begin]

    @property
    def begin_names(self) -> str:
        """`begin` by name."""
        return "".join(str(self.inner.id_to_token(token)) for token in self.begin)

    @cached_property
    def commanding(self) -> tokenizers.Tokenizer:
        """The same tokenizer, for texts of which every word is ours: special tokens in them are commands."""
        inner = tokenizers.Tokenizer.from_str(self.inner.to_str())
        inner.encode_special_tokens = False
        return inner

    @cached_property
    def special(self) -> dict[str, int]:
        """The special tokens by name, and their ids."""
        return {token.content: number for number, token in self.inner.get_added_tokens_decoder().items() if token.special}

    def rows(self, commands: Iterable[str] = ()) -> int:
        """Rows that a model needs to read texts: one more than the largest id of a text, of its beginning and end, and of `commands`.

        A special token that is none of them never comes out of a text, and may have no row, as Gemma 3's for images in models of text.
        """
        said = [self.special[name] for name in commands if name in self.special]
        return 1 + max((self.ids - set(self.special.values())) | {self.end_id, *self.begin, *said})

    @cached_property
    def added(self) -> frozenset[str]:
        """The names of all tokens that are found in a text before it is cut up: the special ones, and others."""
        return frozenset(token.content for token in self.inner.get_added_tokens_decoder().values())

    @cached_property
    def special_names(self) -> tuple[str, ...]:
        """The names of the special tokens, longer ones first."""
        return tuple(sorted(self.special, key=lambda name: (-len(name), name)))

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Finds the name of any special token."""
        return re.compile("|".join(map(re.escape, self.special_names)))

    @cached_property
    def special_ends(self) -> frozenset[str]:
        """What names of special tokens begin and end with, two letters at least and never the whole name."""
        inner = [(name, cut) for name in self.special for cut in range(2, len(name))]
        return frozenset(part for name, cut in inner for part in (name[:cut], name[-cut:]))

    def part_of_special(self, text: str) -> bool:
        """Whether a text is a part of a special token's name that is no word, or has one at its beginning or end."""
        text, longest = text.strip(), len(self.special_names[0])
        if not NO_WORD.search(text):
            return False
        at_an_end = any(part in self.special_ends for cut in range(2, longest) for part in (text[:cut], text[-cut:]))
        return at_an_end or (len(text) < longest and any(text in name for name in self.special_names))

    def extended(self, names: Sequence[str]) -> Tokenizer:
        """This tokenizer with further special tokens; those that it has keep their ids, new ones follow the largest."""
        missing = [name for name in dict.fromkeys(names) if name not in self.special]
        if not missing:
            return self
        inner = tokenizers.Tokenizer.from_str(self.inner.to_str())
        inner.add_special_tokens(missing)
        return Tokenizer(inner, end=self.end)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special tokens appear by name, bytes that are no UTF-8 as U+FFFD."""
        return self.inner.decode([int(token) for token in ids], skip_special_tokens=False)

    def piece(self, ids: Sequence[int], *, first: bool) -> str:
        """What some ids add to a text. first: it begins with them; some tokenizers leave out the space before a text, and no other."""
        if first:
            return self.decode(ids)
        return self.decode([*self._letter, *ids])[len(self.decode(self._letter)) :]

    @cached_property
    def _letter(self) -> list[int]:
        """A token of a text, after which others are not its first."""
        return self.encode("a")[-1:]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each id, a space at its beginning included; together they are that of all, where each is whole letters."""
        return [self.piece([token], first=at == 0) for at, token in enumerate(ids)]

    @property
    def ids(self) -> set[int]:
        """The ids that are tokens; there may be gaps below vocab_size."""
        return set(self.inner.get_vocab(with_added_tokens=True).values())

    @cached_property
    def canonical(self) -> str:
        """The JSON that defines the tokenizer, with sorted keys."""
        return json.dumps(json.loads(self.inner.to_str()), sort_keys=True, ensure_ascii=True, separators=(",", ":"))

    @cached_property
    def hash(self) -> str:
        """sha256 of the canonical JSON and the name of the end token."""
        return hashlib.sha256(f"{self.end}\n{self.canonical}".encode()).hexdigest()

    @property
    def files(self) -> dict[str, bytes]:
        """name -> content of the files that define it, named as Hugging Face does."""
        named = {"eos_token": self.end, "bos_token": self.bos, "chat_template": self.chat_template}
        config = {key: value for key, value in named.items() if value}
        return {"tokenizer.json": self.canonical.encode(), "tokenizer_config.json": json.dumps(config).encode()}

    @property
    def kept(self) -> dict[str, bytes]:
        """`files`, as they were read where they were."""
        return self.files | self.beside

    def save(self, folder: Path) -> Path:
        """Writes `tokenizer.json` and the end token's name beside it, as Hugging Face does; returns the former's path."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            write_durably(folder / name, content)
        return folder / "tokenizer.json"


def load(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, or in the folder that holds one.

    The end token is what `tokenizer_config.json` beside it calls eos_token, or else the first known one it has.
    Raises UsageError when there is no file or no end token, DataError when the file is not a tokenizer.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        make = f"dist-llm tokenizer train SOURCE --out {shlex.quote(str(file.parent))} makes one; or name another: data.tokenizer.path=PATH"
        expected = "a tokenizer.json, or its folder"
        raise UsageError("there is no tokenizer.json", where=str(file), expected=expected, found="no such file", next=make)
    if file.stat().st_size > LARGEST_FILE:
        size = f"{file.stat().st_size >> 20} MiB"
        raise DataError("the tokenizer is too large to be one", where=str(file), expected=f"at most {LARGEST_FILE >> 20} MiB", found=size)
    try:
        inner = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception for whatever it cannot read
        expected = "a tokenizer.json of the tokenizers library"
        raise DataError("the file is not a tokenizer", where=str(file), expected=expected, found=plain(error)[:160]) from error
    end = _end_token(inner, file.with_name("tokenizer_config.json"))
    if end is None:
        expected, way = (
            "one of " + " ".join(KNOWN_ENDS),
            f"name it as eos_token in {file.with_name('tokenizer_config.json')}, then the same command again",
        )
        raise UsageError(
            "the tokenizer has no token that ends a document", where=str(file), expected=expected, found="none of them", next=way
        )
    tokenizer = Tokenizer(inner, end=end, beside=_beside(file))
    if lacking := set(tokenizer.begin) - tokenizer.ids:
        what, found = "the tokenizer puts a token before texts that it does not have", f"id {min(lacking)}"
        raise DataError(what, where=str(file), expected="one of its ids", found=found)
    return tokenizer


def bytes_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are the bytes of the UTF-8 text, 256 is the end."""
    vocab = {letter: byte for byte, letter in enumerate(_byte_letters())}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END])
    return Tokenizer(inner)


def ids_tokenizer(vocab: int, *, end: int) -> Tokenizer:
    """`vocab` numbers whose text is not known: id 17 is written `<17>`, and anything else is no text. end: the id that ends a document."""
    assert 0 <= end < vocab, (end, vocab)
    inner = tokenizers.Tokenizer(models.WordLevel(vocab={f"<{number}>": number for number in range(vocab)}, unk_token=f"<{end}>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("<[0-9]+>"), behavior="removed", invert=True)
    inner.decoder = decoders.Fuse()
    return Tokenizer(inner, end=f"<{end}>")


def train_bpe(texts: Iterable[str], *, vocab: int, special: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE of at most `vocab` tokens (fewer when the texts are too small); the end token is id 0, then come other special ones.

    The same texts give the same tokenizer, whatever the number of threads. Raises UsageError for a vocabulary below 257 and
    the special tokens.
    """
    names = list(dict.fromkeys((END, *special)))
    smallest = SMALLEST_BPE - 1 + len(names)
    if vocab < smallest:
        expected = f"at least {smallest}: every byte, " + ("and the end" if len(names) == 1 else f"and {len(names)} special tokens")
        raise UsageError("the vocabulary is too small for text", where="data.tokenizer.vocab", expected=expected, found=str(vocab))
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(_grouped(texts), trainer)
    return Tokenizer(inner)


def report(tokenizer: Tokenizer, texts: Sequence[str], *, examples: int = 3) -> dict:
    """How well a tokenizer fits some texts.

    `bytes_per_token`, `tokens_per_word` (a word is a run of non-blanks), `used_vocab` (the fraction of the vocabulary
    that occurs), `roundtrip` (how many texts decode to themselves, of how many), and examples as pieces.
    """
    ids = tokenizer.encode_batch(texts)
    tokens = sum(map(len, ids))
    text_bytes = sum(len(text.encode()) for text in texts)
    words = sum(len(text.split()) for text in texts)
    used = set().union(*ids) if ids else set()
    return {
        "version": 1,
        "vocab": tokenizer.vocab_size,
        "hash": tokenizer.hash,
        "texts": len(texts),
        "bytes": text_bytes,
        "tokens": tokens,
        "bytes_per_token": text_bytes / max(1, tokens),
        "tokens_per_word": tokens / max(1, words),
        "used_vocab": len(used) / tokenizer.vocab_size,
        "roundtrip": sum(tokenizer.decode(one) == text for one, text in zip(ids, texts, strict=True)),
        "examples": [tokenizer.pieces(one[:24]) for one in ids[:examples]],
    }


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level vocabularies: itself where it prints, the next free one from U+0100 where not."""
    spare = iter(range(256, 512))
    return [chr(byte) if re.match(r"[!-~¡-¬®-ÿ]", chr(byte)) else chr(next(spare)) for byte in range(256)]


def _grouped(texts: Iterable[str], size: int = 256) -> Iterator[list[str]]:
    """Lists of texts: the trainer crosses into Python once a list."""
    group: list[str] = []
    for text in texts:
        group.append(text)
        if len(group) == size:
            yield group
            group = []
    yield group


def _beside(file: Path) -> dict[str, bytes]:
    """The files of a tokenizer called tokenizer.json; nothing of another, or where they are not sound."""
    if file.name != "tokenizer.json":
        return {}
    try:
        return read_beside(file.parent, (*TOKENIZER_FILES, *SLOW_TOKENIZER_FILES))
    except CheckpointError:
        return {}


def _begin(inner: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The ids that a tokenizer's post-processor puts before a text: that is where Hugging Face's files say it, and nowhere else."""
    if inner.post_processor is None:
        return ()
    found: list[int] = []
    state = json.loads(inner.post_processor.__getstate__())
    for rule in state.get("processors", [state]):
        if "cls" in rule:  # of BERT and RoBERTa
            found.append(rule["cls"][1])
        for part in rule.get("single", ()):
            if "Sequence" in part:
                break
            found += rule["special_tokens"][part["SpecialToken"]["id"]]["ids"]
    return tuple(found)


def _end_token(inner: tokenizers.Tokenizer, config: Path) -> str | None:
    """The name of the end token, from the configuration beside the tokenizer or by its usual names."""
    named = None
    if config.is_file() and config.stat().st_size < LARGEST_FILE:
        try:
            named = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError, OSError, RecursionError):
            named = None
    named = named.get("content") if isinstance(named, dict) else named
    candidates = (named, *KNOWN_ENDS) if isinstance(named, str) else KNOWN_ENDS
    return next((name for name in candidates if inner.token_to_id(name) is not None), None)
