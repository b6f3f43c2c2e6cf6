"""The text of a policy file: its TOML value, and the lines that tomllib does not tell."""

from __future__ import annotations

import re
import tomllib
from typing import Any, NoReturn

from sandbox.errors import PolicyError


class PolicySource:
    """One policy file. PolicyError if it is not TOML or does not write rules as ``[[rule]]``."""

    _HEADER = re.compile(r"\s*\[\[\s*rule\s*\]\]")

    def __init__(self, text: str, filename: str) -> None:
        self.filename = filename
        self.lines = text.splitlines()
        try:
            self.table: dict[str, Any] = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            found = re.search(r"\(at line (\d+), column \d+\)", str(error))
            line = int(found[1]) if found else len(self.lines)
            reason = re.sub(r" \(at .*\)$", "", str(error))
            self.fail(line, f"not valid TOML: {reason[:1].lower()}{reason[1:]}")
        self._starts = self._rule_starts()

    def fail(self, line: int, reason: str, hint: str = "") -> NoReturn:
        """Raise :class:`PolicyError` for ``line`` (counted from 1)."""
        raise PolicyError(f"{self.filename}:{line}: {reason}{hint}")

    def rules(self) -> list[tuple[int, dict[str, Any]]]:
        """(line, table) of each rule."""
        return list(zip(self._starts, self.table.get("rule", []), strict=True))

    def line_of_key(self, key: str, rule: int | None = None) -> int:
        """Where ``key`` is set: in a rule, or at the top."""
        return self._find(re.compile(rf"\s*\[*\s*[\"']?{re.escape(key)}\b"), rule)

    def line_of_item(self, rule: int, item: str) -> int:
        """Where a rule names ``item``."""
        return self._find(re.compile(rf".*([\"']){re.escape(item)}\1"), rule)

    def _find(self, pattern: re.Pattern[str], rule: int | None) -> int:
        """First line of a rule (or of the file) that matches, else the line where it starts."""
        ends = [*self._starts, len(self.lines) + 1]
        first, end = (1, len(self.lines) + 1) if rule is None else ends[rule : rule + 2]
        for line in range(first, end):
            if pattern.match(self.lines[line - 1]):
                return line
        return first

    def _rule_starts(self) -> list[int]:
        rules = self.table.get("rule", [])
        if not isinstance(rules, list) or not all(isinstance(r, dict) for r in rules):
            self.fail(self._line_of_rule_key(), "write every rule under its own [[rule]] line")
        starts = [n for n, text in enumerate(self.lines, 1) if self._HEADER.match(text)]
        if len(starts) != len(rules):  # a header inside a text of several lines, which is no rule
            starts = [n for n in starts if self._is_toml(self.lines[: n - 1])]
        if len(starts) != len(rules):
            self.fail(self._line_of_rule_key(), "write every rule under its own [[rule]] line")
        return starts

    def _line_of_rule_key(self) -> int:
        matches = (n for n, text in enumerate(self.lines, 1) if re.match(r"\s*\[*\s*rule\b", text))
        return next(matches, 1)

    @staticmethod
    def _is_toml(lines: list[str]) -> bool:
        try:
            tomllib.loads("\n".join(lines))
        except tomllib.TOMLDecodeError:
            return False
        return True
