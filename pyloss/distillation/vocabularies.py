"""Whether a teacher's classes are a student's: the same tokens under the same ids."""

from __future__ import annotations

import hashlib
from typing import Any

from pyloss.checks.numbers import shown


def check_vocabularies(student: Any, teacher: Any) -> None:
    """Refuse two tokenizers (`Tokenizer`) that differ in a token.

    Heads may have more rows than their tokenizer has tokens (padding): only tokens are compared.

    Raises ValueError with the numbers of tokens and the first id at which they differ.
    """
    ours, theirs = _tokens(student), _tokens(teacher)
    if ours == theirs:
        return
    first = min(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    raise ValueError(
        f"the student's tokenizer has {len(ours)} tokens and the teacher's {len(theirs)}, and id "
        f"{first} is {_named(ours.get(first))} in the student's and {_named(theirs.get(first))} in "
        "the teacher's: a teacher must have the same tokenizer"
    )


def vocabulary_hash(tokenizer: Any) -> str:
    """A hash of a tokenizer's tokens and their ids."""
    text = "\n".join(f"{i} {token!r}" for i, token in sorted(_tokens(tokenizer).items()))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _tokens(tokenizer: Any) -> dict[int, str]:
    """The tokens by their ids."""
    return {i: token for token, i in tokenizer.backend.get_vocab(with_added_tokens=True).items()}


def _named(token: str | None) -> str:
    return "no token" if token is None else shown(token)
