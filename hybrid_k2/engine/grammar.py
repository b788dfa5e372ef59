"""Grammars that bind a reply."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_k2.errors import RequestError


class Grammar:
    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> Grammar:
        raise RequestError("response_format: grammars are not here yet")

    @classmethod
    def json_object(cls) -> Grammar:
        raise RequestError("response_format: grammars are not here yet")

    @classmethod
    def tools(cls, tools: Sequence[Mapping[str, Any]], choice: str, *, parallel: bool = True) -> Grammar | None:
        return None
