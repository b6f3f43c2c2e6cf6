"""Which instructions the fast path may run: an allowlist as ordered rules, read from TOML.

A policy file::

    extends = "baseline"        # optional: a preset, or a file beside this one
    unhandled = "inject"        # when no handler takes a trapped instruction: inject | exit | skip
    float_flags = "lazy"        # what the fast path leaves out of MXCSR: see sandbox.side_effects
    alignment = "lazy"          # #GP of misaligned SSE operands, left out in the same way
    lowering = true             # trapped instructions may run as sequences of allowed ones
    host = true                 # vector instructions among them may run on the host's own CPU

    [[rule]]
    action = "trap"             # or "allow"
    mnemonic = ["popcnt", "pcmp?str*"]
    comment = "why"

A rule holds for an instruction that any of its keys names: ``feature`` (CPUID features by
iced-x86's names), ``mnemonic``, ``form`` (iced-x86's ``Code`` names, the exact encoding) and
``bytes`` (opcode bytes from the first prefix on, ``?`` for any nibble); each is a string or a list,
``*`` and ``?`` match in mnemonics and forms. With ``operands = "memory"`` (or ``"register"``) it
holds only where ModRM names memory (or does not). The last rule that holds decides; without one the
instruction is trapped. Allowing a feature allows what needs no other feature than those allowed so
far; trapping one traps all that needs it. Bytes that are no instruction are never allowed.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, cast, get_args

from iced_x86 import Code, Instruction, Mnemonic, OpKind

from sandbox.decode import FEATURE_NAMES, FORM_NAMES, MNEMONIC_NAMES, Insn
from sandbox.errors import PolicyError
from sandbox.handler import BytePattern
from sandbox.policy_source import PolicySource

Unhandled: TypeAlias = Literal["inject", "exit", "skip"]
"""What happens to a trapped instruction that no handler takes."""
UNHANDLED: Final = get_args(Unhandled)

Exactness: TypeAlias = Literal["lazy", "exact"]
"""Whether a side effect that the fast path lacks is left out and told, or had from handlers."""

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "unhandled": UNHANDLED,
    "float_flags": get_args(Exactness),
    "alignment": get_args(Exactness),
}
_SWITCHES = ("lowering", "host")
_TOP_KEYS = ("extends", *_CHOICES, *_SWITCHES, "rule")
_SELECTORS = ("feature", "mnemonic", "form", "bytes")
_OPERANDS = ("memory", "register")
_RULE_KEYS = ("action", "comment", "operands", *_SELECTORS)
_ACTIONS = ("allow", "trap")
_NO_INSTRUCTION: Mapping[str, frozenset[int]] = {
    "feature": frozenset(),
    "mnemonic": frozenset(getattr(Mnemonic, n) for n in "INVALID DB DW DD DQ ZERO_BYTES".split()),
    "form": frozenset(
        getattr(Code, n)
        for n in "INVALID DECLAREBYTE DECLAREWORD DECLAREDWORD DECLAREQWORD ZERO_BYTES".split()
    ),
}
"""What iced-x86 numbers for its own use."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule, its names resolved to iced-x86's numbers. ``line`` is where it starts."""

    allow: bool
    file: str
    line: int
    comment: str
    features: frozenset[int] = frozenset()
    mnemonics: frozenset[int] = frozenset()
    forms: frozenset[int] = frozenset()
    bytes: re.Pattern[bytes] | None = None
    """Matches the start of an instruction."""
    operands: str = ""
    """``memory`` or ``register``: holds only for instructions with or without such an operand."""

    @property
    def is_detailed(self) -> bool:
        """Whether it takes more than the form to know if the rule holds."""
        return self.bytes is not None or bool(self.operands)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether the fast path may run an instruction, and the rule that says so (None: no rule)."""

    allow: bool
    rule: Rule | None


ALLOW, TRAP, ASK = 0, 1, 2
"""What an engine does with a form: run it, never run it, ask about each instruction."""


class Policy:
    """Ordered rules, compiled to one byte per instruction form.

    ``allowed[insn.code]`` is 1 where the fast path may run the form; ``marks[insn.code]`` is ALLOW,
    TRAP, or ASK where :meth:`allows` must be asked about the instruction.
    """

    def __init__(
        self,
        name: str,
        rules: Iterable[Rule],
        unhandled: Unhandled = "inject",
        float_flags: Exactness = "lazy",
        alignment: Exactness = "lazy",
        lowering: bool = True,
        host: bool = True,
    ) -> None:
        self.name = name
        self.rules = tuple(rules)
        self.unhandled: Unhandled = unhandled
        self.float_flags: Exactness = float_flags
        self.alignment: Exactness = alignment
        self.lowering = lowering
        """Whether a trapped instruction may become a sequence of allowed ones."""
        self.host = host
        """Whether, if it may, a vector instruction may be run by the host's own CPU."""
        self._deciding = _deciding_rules(self.rules)
        """By form: the number of the last rule that holds whatever the operands, or -1."""
        self.allowed = bytes(i >= 0 and self.rules[i].allow for i in self._deciding)
        self._detailed = _detailed_rules(self.rules)
        self.byte_rules = tuple((i, r) for i, r in enumerate(self.rules) if r.bytes)
        """(number, rule) of the rules with byte patterns, in order."""
        patterns = [rule.bytes.pattern for _, rule in self.byte_rules if rule.bytes]
        self._any_bytes = re.compile(b"|".join(patterns), re.DOTALL) if patterns else None
        self.marks = self._marks()

    def _marks(self) -> bytes:
        if self.byte_rules:
            return bytes([ASK]) * len(self.allowed)
        marks = bytearray(ALLOW if allow else TRAP for allow in self.allowed)
        for code, numbers in self._detailed.items():
            if numbers[-1] > self._deciding[code]:
                marks[code] = ASK
        return bytes(marks)

    @classmethod
    def load(cls, name_or_path: str | Path) -> Policy:
        """A preset by name, or a policy file: anything with a ``/`` or ending in ``.toml``."""
        name = str(name_or_path)
        if not _is_path(name_or_path):
            return _load_preset(name, ())
        return _load_file(Path(name), ())

    @classmethod
    def parse(cls, text: str, filename: str = "<policy>") -> Policy:
        """A policy from its TOML text; ``filename`` is for messages and for ``extends``."""
        return _parse(text, filename, Path(filename).parent, ())

    def with_unhandled(self, unhandled: Unhandled) -> Policy:
        """The same rules with another answer to unhandled instructions."""
        return Policy(
            self.name, self.rules, unhandled, self.float_flags, self.alignment, self.lowering,
            self.host,
        )  # fmt: skip

    def with_exactness(
        self,
        float_flags: Exactness | None = None,
        alignment: Exactness | None = None,
        lowering: bool | None = None,
        host: bool | None = None,
    ) -> Policy:
        """The same rules with other choices about side effects and lowering; None leaves a choice
        as it is."""
        return Policy(
            self.name,
            self.rules,
            self.unhandled,
            float_flags or self.float_flags,
            alignment or self.alignment,
            self.lowering if lowering is None else lowering,
            self.host if host is None else host,
        )

    def deciding(self, code: int) -> int:
        """The number of the last rule that names a form, whatever its operands; -1 if none."""
        return self._deciding[code]

    def allows(self, insn: Insn) -> bool:
        """Whether the fast path may run ``insn``."""
        if insn.code in self._detailed or (self._any_bytes and self._any_bytes.match(insn.raw)):
            return self.decide(insn).allow
        return bool(self.allowed[insn.code])

    def decide(self, insn: Insn) -> Decision:
        """Whether the fast path may run ``insn``, and which rule says so."""
        last = self._deciding[insn.code]
        candidates = [n for n in self._detailed.get(insn.code, ()) if n > last]
        candidates += [
            number
            for number, rule in self.byte_rules
            if number > last and rule.bytes and rule.bytes.match(insn.raw)
        ]
        for number in candidates:
            operands = self.rules[number].operands
            if not operands or operands == operand_kind(insn):
                last = max(last, number)
        if last < 0:
            return Decision(False, None)
        return Decision(self.rules[last].allow, self.rules[last])


def operand_kind(insn: Insn) -> str:
    """``memory`` if ModRM names a memory operand, else ``register``."""
    iced = insn.iced
    kinds = (iced.op_kind(position) for position in range(iced.op_count))
    return "memory" if OpKind.MEMORY in kinds else "register"


def presets() -> list[str]:
    """Names of the policies that come with the sandbox."""
    files = resources.files("sandbox.policies").iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


# --- from rules to a table by form ---------------------------------------------------------------


class _Forms:
    """All instruction forms, and which of them have a mnemonic or need a feature."""

    def __init__(self) -> None:
        self.needs: dict[int, frozenset[int]] = {}
        self.of_mnemonic: dict[int, list[int]] = {}
        self.of_feature: dict[int, list[int]] = {}
        blank = Instruction()
        for code in _names("form").values():
            blank.code = cast(Any, code)
            self.needs[code] = frozenset(blank.cpuid_features())
            self.of_mnemonic.setdefault(blank.mnemonic, []).append(code)
            for feature in self.needs[code]:
                self.of_feature.setdefault(feature, []).append(code)


_forms = cache(_Forms)


def _deciding_rules(rules: tuple[Rule, ...]) -> list[int]:
    forms = _forms()
    deciding = [-1] * (max(forms.needs) + 1)
    allowed_features: set[int] = set()
    for number, rule in enumerate(rules):
        if rule.operands:
            continue
        if rule.allow:
            allowed_features |= rule.features
        else:
            allowed_features -= rule.features
        for code in rule.forms:
            deciding[code] = number
        for mnemonic in rule.mnemonics:
            for code in forms.of_mnemonic.get(mnemonic, ()):
                deciding[code] = number
        for feature in rule.features:
            for code in forms.of_feature.get(feature, ()):
                if not rule.allow or forms.needs[code] <= allowed_features:
                    deciding[code] = number
    return deciding


def _detailed_rules(rules: tuple[Rule, ...]) -> dict[int, list[int]]:
    """By form: the numbers of the rules about its operands, in order."""
    forms = _forms()
    found: dict[int, list[int]] = {}
    for number, rule in enumerate(rules):
        if not rule.operands:
            continue
        codes = set(rule.forms)
        for mnemonic in rule.mnemonics:
            codes.update(forms.of_mnemonic.get(mnemonic, ()))
        for feature in rule.features:
            codes.update(forms.of_feature.get(feature, ()))
        for code in codes:
            found.setdefault(code, []).append(number)
    return found


# --- from text to rules --------------------------------------------------------------------------


def _is_path(name: str | Path) -> bool:
    return isinstance(name, Path) or "/" in name or name.endswith(".toml")


def _load_preset(name: str, chain: tuple[str, ...]) -> Policy:
    if name not in presets():
        raise PolicyError(f"unknown policy {name!r}{_nearest(name, presets())}; {_preset_list()}")
    text = resources.files("sandbox.policies").joinpath(f"{name}.toml").read_text("utf-8")
    return _parse(text, f"{name}.toml", None, chain)


def _load_file(path: Path, chain: tuple[str, ...]) -> Policy:
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise PolicyError(f"{path}: cannot read this policy: {reason}; {_preset_list()}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise PolicyError(f"{path}:{line}: a policy is UTF-8 text, this is not") from None
    return _parse(text, str(path), path.parent, chain)


def _preset_list() -> str:
    return f"presets are {', '.join(presets())}; a file is given by a path that ends in .toml"


def _parse(text: str, filename: str, folder: Path | None, chain: tuple[str, ...]) -> Policy:
    source = PolicySource(text, filename)
    table = source.table
    for key in table:
        if key not in _TOP_KEYS:
            source.fail(source.line_of_key(key), f"unknown key {key!r}", _nearest(key, _TOP_KEYS))
    if "rule" not in table and "extends" not in table:
        source.fail(
            1, "no rules, so everything would be trapped; if you want that, extend 'nothing'"
        )
    base = _base(source, folder, (*chain, filename)) if "extends" in table else None
    choices = {key: _choice(source, key, base) for key in _CHOICES}
    rules = (*(base.rules if base else ()), *_rules(source))
    switches = {key: _switch(source, key, base) for key in _SWITCHES}
    return Policy(Path(filename).stem, rules, **cast(Any, choices | switches))


def _switch(source: PolicySource, key: str, base: Policy | None) -> bool:
    value = source.table.get(key, getattr(base, key) if base else True)
    if not isinstance(value, bool):
        source.fail(source.line_of_key(key), f"{key} is {value!r}, want true or false")
    return bool(value)


def _choice(source: PolicySource, key: str, base: Policy | None) -> str:
    """What a key of the top level chooses: the file's word, that of its base, or the first."""
    values = _CHOICES[key]
    value = source.table.get(key)
    if value is None:
        return str(getattr(base, key)) if base else values[0]
    if value not in values:
        reason = f"{key} is {value!r}, want one of {', '.join(values)}"
        source.fail(source.line_of_key(key), reason, _nearest(value, values))
    return str(value)


def _base(source: PolicySource, folder: Path | None, chain: tuple[str, ...]) -> Policy:
    name, line = source.table["extends"], source.line_of_key("extends")
    if not isinstance(name, str):
        source.fail(line, f"extends is {_type(name)}, want the name of one policy")
    path = str((folder or Path()) / name)
    if (path if _is_path(name) else f"{name}.toml") in chain:
        source.fail(line, f"extends goes in a circle: {' -> '.join((*chain, name))}")
    try:
        return _load_file(Path(path), chain) if _is_path(name) else _load_preset(name, chain)
    except PolicyError as error:
        if re.match(r".*:\d+: ", str(error)):
            raise
        source.fail(line, str(error))


def _rules(source: PolicySource) -> list[Rule]:
    seen: dict[tuple[str, str, str], tuple[str, int]] = {}
    rules = []
    for number, (line, table) in enumerate(source.rules()):
        rules.append(_rule(source, number, line, table))
        for key in _SELECTORS:
            for item in _items(table.get(key, [])):
                named = (key, item, table.get("operands", ""))
                action, where = seen.setdefault(named, (table["action"], line))
                if action != table["action"]:
                    source.fail(
                        source.line_of_item(number, item),
                        f"contradiction: {key} {item!r} has action {action!r} in the rule at"
                        f" line {where} and {table['action']!r} here",
                    )
    return rules


def _rule(source: PolicySource, number: int, line: int, table: Mapping[str, Any]) -> Rule:
    for key in table:
        if key not in _RULE_KEYS:
            at = source.line_of_key(key, number)
            source.fail(at, f"unknown key {key!r} in a rule", _nearest(key, _RULE_KEYS))
    action = table.get("action")
    if action not in _ACTIONS:
        what = "the rule has no action" if action is None else f"action is {action!r}"
        at = source.line_of_key("action", number)
        source.fail(at, f"{what}, want 'allow' or 'trap'", _nearest(action, _ACTIONS))
    operands = table.get("operands", "")
    if operands and operands not in _OPERANDS:
        at = source.line_of_key("operands", number)
        hint = _nearest(operands, _OPERANDS)
        source.fail(at, f"operands is {operands!r}, want 'memory' or 'register'", hint)
    comment = table.get("comment", "")
    if not isinstance(comment, str):
        at = source.line_of_key("comment", number)
        source.fail(at, f"comment is {_type(comment)}, want text")
    for key in _SELECTORS:
        _check_items(source, number, key, table.get(key))
    if not any(table.get(key) for key in _SELECTORS):
        source.fail(line, f"empty rule: give one of {', '.join(_SELECTORS)}")

    def resolve(key: str, change: Callable[[str], str]) -> frozenset[int]:
        names, found = _names(key), set[int]()
        for item in _items(table.get(key, [])):
            matches = _lookup(change(item), names, globs=key != "feature")
            if not matches:
                at = source.line_of_item(number, item)
                source.fail(at, f"unknown {key} {item!r}", _nearest(change(item), names))
            found.update(matches)
        return frozenset(found)

    return Rule(
        allow=action == "allow",
        file=source.filename,
        line=line,
        comment=" ".join(comment.split()),
        features=resolve("feature", str.upper),
        mnemonics=resolve("mnemonic", str.lower),
        forms=resolve("form", str.upper),
        bytes=_bytes(source, number, _items(table.get("bytes", []))),
        operands=operands,
    )


def _check_items(source: PolicySource, number: int, key: str, value: object) -> None:
    if value is None:
        return
    at = source.line_of_key(key, number)
    if isinstance(value, list):
        for item in value:
            if not isinstance(item, str):
                source.fail(at, f"{key} holds {_type(item)}, want text only")
    elif not isinstance(value, str):
        source.fail(at, f"{key} is {_type(value)}, want text or a list of texts")
    if not _items(value) or not all(item.strip() for item in _items(value)):
        source.fail(at, f"{key} is empty: name something or leave it out")


def _bytes(source: PolicySource, number: int, items: list[str]) -> re.Pattern[bytes] | None:
    """One regular expression for all patterns: these are matched at every instruction."""
    alternatives = []
    for item in items:
        try:
            pattern = BytePattern.parse(item)
        except ValueError as error:
            source.fail(source.line_of_item(number, item), str(error))
        want = pattern.value.to_bytes(pattern.length, "big")
        mask = pattern.mask.to_bytes(pattern.length, "big")
        alternatives.append(b"".join(_byte_class(w, m) for w, m in zip(want, mask, strict=True)))
    return re.compile(b"|".join(alternatives), re.DOTALL) if alternatives else None


def _byte_class(want: int, mask: int) -> bytes:
    return b"[%s]" % b"".join(b"\\x%02x" % b for b in range(256) if b & mask == want)


def _items(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _lookup(item: str, names: Mapping[str, int], *, globs: bool) -> list[int]:
    if globs and any(c in item for c in "*?["):
        start = re.split(r"[*?[]", item, maxsplit=1)[0]
        matches = re.compile(fnmatch.translate(item)).match
        return [
            number for name, number in names.items() if name.startswith(start) and matches(name)
        ]
    return [names[item]] if item in names else []


@cache
def _names(key: str) -> dict[str, int]:
    """What a selector may name, with iced-x86's numbers."""
    tables = {"feature": FEATURE_NAMES, "mnemonic": MNEMONIC_NAMES, "form": FORM_NAMES}
    return {
        name: number
        for number, name in tables[key].items()
        if isinstance(number, int) and number not in _NO_INSTRUCTION[key]
    }


def _nearest(name: object, names: Iterable[str]) -> str:
    found = difflib.get_close_matches(str(name), names, 1, 0.6) if name else []
    return f"; did you mean {found[0]!r}?" if found else ""


def _type(value: object) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "a table"}
    return names.get(type(value), type(value).__name__)
