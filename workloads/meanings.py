"""A class of settings -> what each of its fields means: the string under the field in the source."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap

from pydantic import BaseModel


def meanings(cls: type[BaseModel]) -> dict[str, str]:
    """The meaning of each field, on one line; "" where none is given.

    The source is read when somebody asks. pydantic would read it whenever the class is defined
    (`use_attribute_docstrings`), so that every command, and every rank, would pay for what `list` prints.
    """
    texts: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if issubclass(owner, BaseModel) and owner is not BaseModel:
            texts.update(_under_fields(owner))
    texts |= {name: info.description for name, info in cls.model_fields.items() if info.description}
    return {name: " ".join(texts.get(name, "").split()) for name in cls.model_fields}


def _under_fields(cls: type) -> dict[str, str]:
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError):  # it has no source: made by a call, or typed at a prompt
        return {}
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }
