"""Tokenizes JSON lines, and marks the tokens that are trained on.

Each line is an object of one of three kinds. Other keys are ignored, except for `tools`, which chat templates use.

    {"text": "..."}                            every token is trained on
    {"prompt": "...", "completion": "..."}     the tokens of the completion are
    {"messages": [{"role", "content"}, ...]}   the assistant's tokens are, by the tokenizer's chat template

Text and completions end with the tokenizer's end-of-sequence token, if it has one; the end of a chat is that of its
template. A token belongs to the completion if any of its characters does. Text that is longer than a sequence is cut
into several; the end of a longer completion or chat is dropped.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ACCEPTED = 'an object with "text", with "prompt" and "completion", or with "messages"'
UNTRAINED = -100  # in place of a target
_KINDS = ("messages", "prompt", "text")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template's own mark of what the assistant says
_AT_ONCE = 1024  # lines that are tokenized together


class Rendering(NamedTuple):
    """One document before it is tokenized: its text, and the spans of it that are trained on."""

    line: int
    text: str
    spans: tuple[tuple[int, int], ...]
    chat: bool
    whole: bool  # whether all of it is trained on: it may be cut anywhere


class Tokenized(NamedTuple):
    line: int
    tokens: NDArray[np.int64]
    trained: NDArray[np.bool_]
    whole: bool


@dataclass
class Documents:
    """Tokenized documents, end to end: at place i, `tokens[i]` is read and `targets[i]` is to be predicted.

    Attributes:
        bounds: where each document begins, and where the last one ends.
        lines: of the file, from 1, that each document came from.
        cut: tokens that were left out, of documents longer than a sequence.
        dropped: documents that had nothing to train on.
    """

    tokens: array[int] = field(default_factory=lambda: array("i"))
    targets: array[int] = field(default_factory=lambda: array("i"))
    bounds: list[int] = field(default_factory=lambda: [0])
    lines: list[int] = field(default_factory=list)
    cut: int = 0
    dropped: int = 0

    def add(self, document: Tokenized, seq_len: int) -> None:
        """Adds a document, as one of at most `seq_len` places or, of text, as several."""
        places = len(document.tokens) - 1
        starts = range(0, places, seq_len) if document.whole else range(0, min(places, 1))
        if not document.whole:
            self.cut += max(places - seq_len, 0)
        kept = False
        for start in starts:
            tokens = document.tokens[start : start + seq_len + 1]
            targets = np.where(document.trained[start : start + seq_len + 1], tokens, UNTRAINED)[1:]
            if (targets != UNTRAINED).any():
                kept = True
                self.tokens.extend(tokens[:-1].tolist())
                self.targets.extend(targets.tolist())
                self.bounds.append(len(self.tokens))
                self.lines.append(document.line)
        self.dropped += not kept

    @property
    def lengths(self) -> list[int]:
        """Places of each document."""
        return [stop - start for start, stop in zip(self.bounds, self.bounds[1:], strict=False)]

    @property
    def trained(self) -> int:
        """Places that have a target."""
        return int((np.frombuffer(self.targets, dtype=np.int32) != UNTRAINED).sum())

    def of_lines(self, lines: set[int]) -> Documents:
        """The documents that came from these lines."""
        chosen = Documents()
        for line, start, stop in zip(self.lines, self.bounds, self.bounds[1:], strict=False):
            if line in lines:
                chosen.tokens.extend(self.tokens[start:stop])
                chosen.targets.extend(self.targets[start:stop])
                chosen.bounds.append(len(chosen.tokens))
                chosen.lines.append(line)
        return chosen


def read_documents(path: Path, tokenizer: Any, *, seq_len: int, vocabulary: int) -> Documents:
    """All documents of a file.

    Args:
        tokenizer: of transformers, as `checked_tokenizer` accepts it.
        seq_len: the most places of a document.
        vocabulary: rows of the model's embedding.

    Raises:
        ValueError: for a line that cannot be used, naming file, line and what is accepted; for a file in which there is
            nothing to train on.
    """
    documents, lines = Documents(), 0
    records = read_lines(path)
    while batch := list(islice(records, _AT_ONCE)):
        lines += len(batch)
        for document in _tokenized(path, tokenizer, batch):
            highest = int(document.tokens.max(initial=-1))
            if highest >= vocabulary:
                token = tokenizer.convert_ids_to_tokens(highest)
                raise ValueError(
                    f"{path}:{document.line}: becomes token {highest}, {token!r}, but the model has {vocabulary:,}"
                    " embeddings: tokenizer and model must belong together"
                )
            documents.add(document, seq_len)
    if not lines:
        raise ValueError(f"{path}: must hold at least one line of JSON, {ACCEPTED}; it holds none")
    if not documents.lines:
        raise ValueError(f"{path}: must hold something to train on; no token of its {lines:,} lines can be")
    return documents


def checked_tokenizer(transformers: Any, folder: Path, vocabulary: int) -> Any:
    """The tokenizer of a folder.

    Raises:
        ValueError: where there is none, where it cannot tell which characters a token stands for, or where it has more
            tokens than the model has embeddings. Tokens that were added to it may be beyond, if no data has them.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # constructors of tokenizers may raise any exception
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{folder}: must have a tokenizer that transformers can load: {reason}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: must have a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__}")
    if tokenizer.vocab_size > vocabulary:
        raise ValueError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size:,} tokens, but its model {vocabulary:,} embeddings"
            " (vocab_size of config.json): tokenizer and model must belong together"
        )
    return tokenizer


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, object) of each line that is not blank, in UTF-8, with or without a byte order mark."""
    if not path.is_file():
        raise ValueError(f"{path}: must be a file of JSON lines: there is none")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}:{number}: must be a line of JSON, {ACCEPTED}: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number}: must be {ACCEPTED}, got {_shown(record)}")
            yield number, record


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _tokenized(path: Path, tokenizer: Any, batch: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[Tokenized]:
    """The documents of some lines, in their order."""
    found: list[Rendering | Tokenized] = []
    for number, record in batch:
        try:
            found += _rendered(tokenizer, number, record)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    encoded: dict[int, Tokenized] = {}
    for chat in (False, True):
        group = {i: one for i, one in enumerate(found) if isinstance(one, Rendering) and one.chat is chat}
        encoded |= dict(zip(group, _encoded(tokenizer, list(group.values()), chat), strict=True))
    for i, one in enumerate(found):
        yield one if isinstance(one, Tokenized) else encoded[i]


def _encoded(tokenizer: Any, renderings: list[Rendering], chat: bool) -> Iterator[Tokenized]:
    if not renderings:
        return
    encoding = tokenizer(
        [rendering.text for rendering in renderings],
        add_special_tokens=not chat,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    last = None if chat else tokenizer.eos_token_id
    for rendering, ids, offsets in zip(renderings, encoding["input_ids"], encoding["offset_mapping"], strict=True):
        tokens = np.array(ids, dtype=np.int64)
        starts, stops = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        trained = np.zeros(len(tokens), dtype=np.bool_)
        for start, stop in rendering.spans:
            trained |= (stops > start) & (starts < stop) & (stops > starts)  # what a tokenizer adds stands for nothing
        if last is not None:
            if not ids or ids[-1] != last:
                tokens, trained = np.append(tokens, last), np.append(trained, True)
            trained[-1] = True
        yield Tokenized(rendering.line, tokens, trained, rendering.whole)


def _rendered(tokenizer: Any, line: int, record: Mapping[str, Any]) -> list[Rendering] | list[Tokenized]:
    """The documents of one line. Its errors name neither file nor line."""
    kinds = [kind for kind in _KINDS if kind in record]
    if len(kinds) != 1:
        raise ValueError(
            f"must be {ACCEPTED}, and one kind alone; got the keys {', '.join(map(repr, record)) or 'none'}"
        )
    if kinds == ["text"]:
        text = _string(record, "text")
        return [Rendering(line, text, ((0, len(text)),), chat=False, whole=True)]
    if kinds == ["prompt"]:
        prompt, completion = _string(record, "prompt"), _string(record, "completion")
        text = prompt + completion
        return [Rendering(line, text, ((len(prompt), len(text)),), chat=False, whole=False)]
    return _conversation(tokenizer, line, _messages(record), record.get("tools"))


def _string(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        got = _shown(value) if key in record else "nothing"
        raise ValueError(f"{key!r} must be a string, got {got}")
    return value


def _messages(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'messages' must be a list of objects with 'role' and 'content', got {_shown(messages)}")
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"'messages'[{place}] must be an object with 'role' and 'content', got {_shown(message)}")
        content = message.get("content")
        if not isinstance(content, str | list) and not message.get("tool_calls"):
            raise ValueError(f"'messages'[{place}]: 'content' must be a string, got {_shown(content)}")
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("'messages' must have one of the role 'assistant': nothing else is trained on")
    return messages


def _conversation(
    tokenizer: Any, line: int, messages: list[dict[str, Any]], tools: Any
) -> list[Rendering] | list[Tokenized]:
    """A conversation in the format of the chat template, with the assistant's answers marked.

    If the template marks them itself (`{% generation %}`), its marks are used. Otherwise an answer is the text that the
    template adds for it to the conversation so far and the opening of an answer. If a template formats earlier answers
    differently from the last one (for example without their reasoning), each answer becomes a document with the
    conversation up to it, which is the model's input when it answers.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "'messages' need a chat template, and the tokenizer has none: put a chat_template.jinja into the model's"
            " folder, or give 'prompt' and 'completion', or 'text'"
        )
    if _GENERATION.search(tokenizer.get_chat_template(tools=tools)):
        return [_marked(tokenizer, line, messages, tools)]

    def render(count: int, opened: bool = False) -> str:
        with _template_errors():
            text: str = tokenizer.apply_chat_template(
                messages[:count], tools=tools, tokenize=False, add_generation_prompt=opened
            )
        return text

    text = render(len(messages))
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    parts = []
    for place in answers:
        so_far = render(place + 1)
        parts.append((so_far, (_opening(render, place, so_far), len(so_far))))
    if all(text.startswith(so_far) for so_far, _ in parts):
        return [Rendering(line, text, tuple(span for _, span in parts), chat=True, whole=False)]
    return [Rendering(line, so_far, (span,), chat=True, whole=False) for so_far, span in parts]


def _opening(render: Callable[..., str], place: int, so_far: str) -> int:
    """Where the answer at `place` begins in the conversation up to it."""
    if place == 0:
        return 0
    for opened in (True, False):
        before = render(place, opened)
        if so_far.startswith(before):
            return len(before)
    raise ValueError(
        f"'messages'[{place}]: the chat template writes what comes before this answer in two ways, with the answer and"
        " without it, so that what the assistant says cannot be told: mark it in the template by {% generation %}"
    )


def _marked(tokenizer: Any, line: int, messages: list[dict[str, Any]], tools: Any) -> Tokenized:
    with _template_errors():
        encoding = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    tokens = np.array(encoding["input_ids"], dtype=np.int64)
    return Tokenized(line, tokens, np.array(encoding["assistant_masks"], dtype=np.bool_), whole=False)


class _template_errors:  # noqa: N801 - used as a context, like those of contextlib
    """Turns exceptions of a chat template into errors of the line."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            reason = " ".join(str(error).split())
            raise ValueError(
                f"'messages' must suit the tokenizer's chat template, which refuses them: {reason}"
            ) from error
