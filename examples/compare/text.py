"""Tokens of text that every installation of Python has: sources and documents of the standard library and of packages.

Nothing is downloaded. Duplicate files are used once, and files are sorted by the SHA-256 of their contents, so the
tokens do not depend on where or when a package was installed. Files whose digest begins with a byte below 13, which are
5 % of them, are held out. A byte-level BPE is trained on the rest. The tokens are stored in a folder of the cache;
delete that folder to read the installed packages again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CODE, PROSE = (".py", ".pyi"), (".md", ".rst", ".txt")
READMES = "METADATA"  # files of installed packages with a header and, after a blank line, their description
_RULES = 1  # a version number; raise it when the rules below change, so that cached tokens of other rules are not used
_FILE_SIZES = range(400, 600_000)  # accepted bytes of a file: shorter files are stubs, longer ones are data
_MIN_SPACES = 1 / 60  # the minimum fraction of spaces: files with fewer are data
_MIN_LETTERS = 3 / 4  # the minimum fraction of letters and whitespace in documents of `Corpus.disjoint`
_DOCSTRING_SOURCES = 64  # of 256 sources, the number whose docstrings are prose
_DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
_MIN_DOCSTRING = 200  # the minimum number of characters of a docstring that is used as prose
_HELD_OUT = 13  # of 256 files, the number that is held out
_SAMPLE_SIZE = 25_000_000  # the number of characters that the vocabulary is trained on
_BATCH_SIZE = 2_000  # the number of texts that are encoded at once
_SKIPPED_FOLDERS = frozenset({"__pycache__", ".git"})
_NON_STDLIB_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib"})


class TextError(ValueError):
    """There is no text, too little text, or no tokenizer."""


@dataclass(frozen=True)
class Corpus:
    """The folders of a text, and the size of its vocabulary.

    Args:
        vocabulary: the number of tokens, at least 257 (all bytes and the end of a text).
        code, prose: the folders that are searched for sources and for documents.
        disjoint: whether to keep prose out of the code, and to use more sources of prose. Prose then consists of
            documents with enough letters (some are data), the descriptions of installed packages, and the docstrings of
            a quarter of the sources, which are not used as code.
    """

    vocabulary: int
    code: tuple[Path, ...]
    prose: tuple[Path, ...] = ()
    disjoint: bool = False

    def folder(self, cache: Path) -> Path:
        identity = json.dumps([_RULES, list(map(str, self.code)), list(map(str, self.prose)), self.disjoint])
        return cache / f"tokens-{self.vocabulary}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"

    def tokens(self, cache: Path) -> Tokens:
        """The tokens, from the cache; they are created if they are not there."""
        folder = self.folder(cache)
        if not (folder / "about.json").exists():
            self._create(folder)
        return Tokens(folder, json.loads((folder / "about.json").read_text())["digests"])

    def _create(self, folder: Path) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        prose = (*PROSE, READMES, *CODE) if self.disjoint else PROSE
        kinds = {"code": (self.code, CODE, self._code), "prose": (self.prose, prose, self._prose)}
        texts = {kind: _texts(*source) for kind, source in kinds.items() if source[0]}
        for kind, parts in texts.items():
            if not all(parts):
                roots, suffixes, _ = kinds[kind]
                files = f"{kind} ({', '.join(suffixes)})"
                searched = ", ".join(map(str, roots))
                raise TextError(f"too few files of {files} for training and validation in {searched}")
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-") as temporary:
            new_folder = Path(temporary) / "tokens"
            new_folder.mkdir()
            encode = _tokenizer([train for train, _ in texts.values()], self.vocabulary, new_folder)
            digests = {}
            for kind, parts in texts.items():
                for part, values in zip(("train", "valid"), map(encode, parts), strict=True):
                    np.save(new_folder / f"{kind}-{part}.npy", values)
                    digests[f"{kind}-{part}"] = hashlib.sha256(values.tobytes()).hexdigest()[:12]
            folders = {kind: list(map(str, roots)) for kind, (roots, *_) in kinds.items()}
            about = {"folders": folders, "vocabulary": self.vocabulary, "digests": digests}
            (new_folder / "about.json").write_text(json.dumps(about, indent=1))
            try:
                new_folder.rename(folder)
            except OSError:  # another process has created the folder
                if not (folder / "about.json").exists():
                    raise

    def _code(self, file: File) -> str:
        return "" if self.disjoint and file.is_docstring_source else file.text

    def _prose(self, file: File) -> str:
        if not self.disjoint:
            return file.text
        if file.path.name.endswith(CODE):
            return file.docstrings if file.is_docstring_source else ""
        text = file.text.partition("\n\n")[2] if file.path.name == READMES else file.text
        letters = sum(character.isalpha() or character.isspace() for character in text)
        return text if letters >= _MIN_LETTERS * len(text) else ""


class File(NamedTuple):
    """A file: the first path with its contents, their digest, and the text."""

    path: Path
    digest: bytes
    text: str

    @property
    def is_docstring_source(self) -> bool:
        return self.digest[1] < _DOCSTRING_SOURCES

    @property
    def docstrings(self) -> str:
        """The long docstrings of the file, without indentation."""
        docstrings = map(inspect.cleandoc, _DOCSTRING.findall(self.text))
        return "\n\n".join(text for text in docstrings if len(text) >= _MIN_DOCSTRING)


@dataclass(frozen=True)
class Tokens:
    """Tokens in the cache: arrays of the kinds "code" and possibly "prose", each in the parts "train" and "valid"."""

    folder: Path
    digests: dict[str, str]

    def digest(self) -> str:
        """The digest of all tokens; results with different digests are not comparable."""
        return hashlib.sha256(json.dumps(self.digests, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sorted({name.split("-")[0] for name in self.digests}))

    def count(self, part: str, kind: str) -> int:
        """The number of tokens, without reading them."""
        return len(np.load(self.folder / f"{kind}-{part}.npy", mmap_mode="r"))

    def load(self, part: str, kinds: tuple[str, ...], device: torch.device) -> Tensor:
        """All tokens of a part, "train" or "valid", one kind after the other: a 1-d int32 tensor."""
        return _load(tuple(self.folder / f"{kind}-{part}.npy" for kind in kinds), device)


@lru_cache(maxsize=2)
def _load(paths: tuple[Path, ...], device: torch.device) -> Tensor:
    """The concatenated arrays, cached because the runs of a process use the same text."""
    arrays = [np.load(path) for path in paths]
    return torch.from_numpy(np.concatenate(arrays).astype(np.int32)).to(device)


def standard_library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def installed_folders() -> tuple[Path, ...]:
    """The folders of the standard library and of all packages that this interpreter can import."""
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    packages |= {path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")}
    return (standard_library(), *sorted(Path(path) for path in packages if Path(path).is_dir()))


def _texts(
    roots: tuple[Path, ...], suffixes: tuple[str, ...], extract: Callable[[File], str]
) -> tuple[list[str], list[str]]:
    """The texts that `extract` returns for files, without empty ones, for training and for validation."""
    contents: dict[bytes, tuple[Path, bytes]] = {}
    for path in _files(roots, suffixes):
        try:
            content = path.read_bytes()
        except OSError:
            continue
        if len(content) in _FILE_SIZES and content.count(b" ") >= _MIN_SPACES * len(content):
            contents.setdefault(hashlib.sha256(content).digest(), (path, content))
    train: list[str] = []
    held_out: list[str] = []
    for digest in sorted(contents):
        path, content = contents.pop(digest)
        try:
            text = extract(File(path, digest, content.decode()))
        except UnicodeDecodeError:
            continue
        if text:
            (held_out if digest[0] < _HELD_OUT else train).append(text)
    return train, held_out


def _files(roots: tuple[Path, ...], suffixes: tuple[str, ...]) -> Iterator[Path]:
    for root in roots:
        skipped = _SKIPPED_FOLDERS | (_NON_STDLIB_FOLDERS if root == standard_library() else frozenset())
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if name not in skipped]
            yield from (Path(folder, name) for name in files if name.endswith(suffixes))


class _Encoder:
    def __init__(self, tokenizer: Any, end: int) -> None:
        self._tokenizer, self._end = tokenizer, end

    def __call__(self, texts: list[str]) -> npt.NDArray[np.uint16]:
        parts = [np.empty(0, dtype=np.uint16)]
        for start in range(0, len(texts), _BATCH_SIZE):
            batch = self._tokenizer.encode_batch_fast(texts[start : start + _BATCH_SIZE])
            parts.extend(np.array([*encoded.ids, self._end], dtype=np.uint16) for encoded in batch)
        return np.concatenate(parts)


def _sample(kinds: list[list[str]]) -> Iterator[str]:
    """The same fraction of each kind of text, 25 million characters in total."""
    fraction = _SAMPLE_SIZE / max(sum(len(text) for texts in kinds for text in texts), 1)
    for texts in kinds:
        remaining = fraction * sum(map(len, texts))
        for text in texts:
            if remaining <= 0:
                break
            yield text
            remaining -= len(text)


def _tokenizer(kinds: list[list[str]], vocabulary: int, folder: Path) -> _Encoder:
    """Trains a byte-level BPE on the texts, and saves it in the folder."""
    if importlib.util.find_spec("tokenizers") is None:
        raise TextError("language tasks need the package `tokenizers`: pip install tokenizers")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(kinds), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return _Encoder(tokenizer, end=0)  # the number of the first special token
