"""A policy allows what its rules say, names the rule, and bad policy files are refused clearly."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox.decode import FORM_NAMES, Insn, decode
from sandbox.errors import PolicyError
from sandbox.policy import Policy, presets


def insn(code: str) -> Insn:
    return decode(bytes.fromhex(code), 64)


NOP, POPCNT, PADDD, VPADDD = "90", "f30fb8c1", "660ffec1", "c5f5fec2"
CPUID, AESENC, VAESENC = "0fa2", "660f38dcc1", "c4e271dcc2"
VADDPS_EVEX_ZMM, VADDPS_EVEX_XMM = "62f1744858c2", "62f1740858c2"


def allows(text: str, code: str) -> bool:
    return Policy.parse(text, "p.toml").allows(insn(code))


ALLOW_ALL = '[[rule]]\naction = "allow"\nform = "*"\n'


# --- meaning -------------------------------------------------------------------------------------


def test_what_no_rule_names_is_trapped() -> None:
    policy = Policy.parse('[[rule]]\naction = "allow"\nmnemonic = "nop"\n')
    assert policy.decide(insn(NOP)).allow
    decision = policy.decide(insn(POPCNT))
    assert (decision.allow, decision.rule) == (False, None)


@pytest.mark.parametrize(
    "selector",
    ['feature = "POPCNT"', 'mnemonic = "popcnt"', 'mnemonic = ["nop", "pop*"]',
     'form = "POPCNT_R32_RM32"', 'form = "popcnt_r??_*"', 'bytes = "f3 0f b8"',
     'bytes = ["0f", "f30fb? c?"]'],
)  # fmt: skip
def test_each_key_selects_the_instruction(selector: str) -> None:
    rule = f'[[rule]]\naction = "trap"\n{selector}\n'
    assert not allows(ALLOW_ALL + rule, POPCNT)
    assert allows(ALLOW_ALL + rule, PADDD)
    assert allows(rule.replace("trap", "allow"), POPCNT)
    assert not allows(rule.replace("trap", "allow"), PADDD)


def test_a_rule_holds_if_any_of_its_keys_does() -> None:
    text = '[[rule]]\naction = "allow"\nmnemonic = "nop"\nfeature = "POPCNT"\n'
    assert allows(text, NOP)
    assert allows(text, POPCNT)


@pytest.mark.parametrize("first", ['mnemonic = "popcnt"', 'bytes = "f3 0f b8 c?"'])
@pytest.mark.parametrize("last", ['form = "POPCNT_*"', 'bytes = "f3 0f b8"'])
def test_the_last_rule_that_holds_decides(first: str, last: str) -> None:
    for one, other in (("allow", "trap"), ("trap", "allow")):
        text = f'[[rule]]\naction="{one}"\n{first}\n[[rule]]\naction="{other}"\n{last}\n'
        decision = Policy.parse(text, "p.toml").decide(insn(POPCNT))
        assert decision.allow == (other == "allow")
        assert str(decision.rule) == "p.toml:4"


def test_a_decision_names_file_line_and_comment() -> None:
    text = '# head\n\n[[rule]]\ncomment = "bits"\naction = "allow"\nfeature = "POPCNT"\n'
    rule = Policy.parse(text, "mine.toml").decide(insn(POPCNT)).rule
    assert rule is not None
    assert (rule.file, rule.line, rule.comment, str(rule)) == (
        "mine.toml",
        3,
        "bits",
        "mine.toml:3",
    )


def test_a_feature_allows_only_what_needs_nothing_else() -> None:
    aes = '[[rule]]\naction = "allow"\nfeature = "AES"\n'
    assert allows(aes, AESENC)
    assert not allows(aes, VAESENC)
    assert allows(aes + '[[rule]]\naction = "allow"\nfeature = "AVX"\n', VAESENC)


def test_features_allowed_by_several_rules_add_up() -> None:
    text = '[[rule]]\naction = "allow"\nfeature = "AVX512F"\n'
    assert allows(text, VADDPS_EVEX_ZMM)
    assert not allows(text, VADDPS_EVEX_XMM)
    assert allows(text + '[[rule]]\naction = "allow"\nfeature = "AVX512VL"\n', VADDPS_EVEX_XMM)


def test_trapping_a_feature_traps_all_that_needs_it() -> None:
    text = ALLOW_ALL + '[[rule]]\naction = "trap"\nfeature = "AVX512VL"\n'
    assert allows(text, VADDPS_EVEX_ZMM)
    assert not allows(text, VADDPS_EVEX_XMM)


def test_the_table_by_form_agrees_with_the_decision() -> None:
    policy = Policy.load("baseline")
    for code in (NOP, POPCNT, PADDD, VPADDD, CPUID, AESENC, VAESENC):
        assert policy.allowed[insn(code).code] == policy.decide(insn(code)).allow
    assert len(policy.allowed) > max(n for n in FORM_NAMES if isinstance(n, int))


def test_bytes_that_are_no_instruction_are_never_allowed() -> None:
    assert Policy.load("everything").allowed[0] == 0


def test_thousands_of_exact_forms_are_one_rule() -> None:
    pseudo = ("INVALID", "DECLARE", "ZERO_BYTES")
    forms = {n: c for c, n in FORM_NAMES.items() if isinstance(c, int)}
    names = [name for name in forms if not name.startswith(pseudo)]
    text = (
        '[[rule]]\naction = "allow"\nform = [\n' + "".join(f'    "{n}",\n' for n in names) + "]\n"
    )
    assert sum(Policy.parse(text).allowed) == len(names) > 4900


def test_names_are_found_in_either_case() -> None:
    assert allows('[[rule]]\naction = "allow"\nmnemonic = "POPCNT"\n', POPCNT)
    assert allows('[[rule]]\naction = "allow"\nfeature = "popcnt"\n', POPCNT)


# --- presets and extends -------------------------------------------------------------------------


def test_presets_load_and_every_rule_has_a_reason() -> None:
    assert {"baseline", "everything", "nothing"} <= set(presets())
    for name in presets():
        policy = Policy.load(name)
        assert policy.name == name
        assert all(rule.comment for rule in policy.rules)


def test_everything_allows_and_nothing_traps() -> None:
    for code in (NOP, VPADDD, CPUID):
        assert Policy.load("everything").allows(insn(code))
        assert not Policy.load("nothing").allows(insn(code))


@pytest.mark.parametrize(
    ("code", "name"),
    [("90", "nop"), ("f3480fb8c1", "popcnt"), ("660ffec1", "paddd"), ("480f44c1", "cmove"),
     ("f0480fb10f", "lock cmpxchg"), ("f0480fc70f", "cmpxchg16b"), ("660f383800", "pminsb"),
     ("f20f38f1c1", "crc32"), ("d8c1", "fadd"), ("0ffec1", "paddd mm"), ("9f", "lahf"),
     ("f30f1efa", "endbr64"), ("0fae00", "fxsave"), ("e800000000", "call"), ("f3a4", "rep movsb")],
)  # fmt: skip
def test_baseline_allows(code: str, name: str) -> None:
    assert Policy.load("baseline").allows(insn(code)), name


@pytest.mark.parametrize(
    ("code", "name"),
    [(VPADDD, "AVX2"), ("c5f9fec2", "VEX.128"), (VADDPS_EVEX_ZMM, "EVEX"), ("c5f877", "vzeroupper"),
     ("c5f892c8", "kmovw"), ("660f3a63c10c", "pcmpistri"), ("66480f3a60c161", "pcmpestrm"),
     ("c4e2f8f5c1", "bzhi"), ("c4e2f8f7c1", "bextr"), ("0f38c8c1", "sha1nexte"),
     ("660f38cfc1", "gf2p8mulb"), ("660f38f6c1", "adcx"), ("8fe978e1c0", "XOP"),
     ("0f0fc19e", "3DNow!"), ("0f05", "syscall"), ("0f34", "sysenter"), (CPUID, "cpuid"),
     ("0fae20", "xsave"), ("0f3800c1", "pshufb mm"), ("660f3802ff", "phaddd"), ("d9fe", "fsin"),
     ("489f", "REX lahf"), ("0fb1db", "cmpxchg ebx, ebx"), ("dd08", "fisttp")],
)  # fmt: skip
def test_baseline_traps_what_is_known_wrong(code: str, name: str) -> None:
    assert not Policy.load("baseline").allows(insn(code)), name


def test_a_user_file_extends_a_preset() -> None:
    text = 'extends = "baseline"\n[[rule]]\naction = "trap"\nmnemonic = "popcnt"\n'
    policy = Policy.parse(text, "p.toml")
    assert str(policy.decide(insn(POPCNT)).rule) == "p.toml:2"
    assert policy.allows(insn(NOP))
    assert not policy.allows(insn(VPADDD))


def test_a_user_file_extends_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(ALLOW_ALL)
    (tmp_path / "b.toml").write_text('extends = "a.toml"\nunhandled = "exit"\n')
    policy = Policy.load(tmp_path / "b.toml")
    assert policy.allows(insn(VPADDD))
    assert (policy.name, policy.unhandled) == ("b", "exit")


def test_unhandled_is_inherited_unless_set() -> None:
    assert Policy.load("baseline").unhandled == "inject"
    assert Policy.parse('extends = "baseline"\nunhandled = "skip"\n').unhandled == "skip"
    assert Policy.parse(ALLOW_ALL).unhandled == "inject"


# --- lines ---------------------------------------------------------------------------------------


def test_a_header_inside_a_text_is_no_rule() -> None:
    text = (
        '[[rule]]\ncomment = """\n[[rule]]\n"""\naction = "allow"\nmnemonic = "nop"\n' + ALLOW_ALL
    )
    assert [rule.line for rule in Policy.parse(text).rules] == [1, 7]


# --- bad input -----------------------------------------------------------------------------------

RULE = '[[rule]]\naction = "allow"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[rule]\n", "p.toml:1: not valid TOML: expected ']]'"),
        ('unhandled = "exit', "p.toml:1: not valid TOML:"),
        ("", "p.toml:1: no rules, so everything would be trapped"),
        ("rule = 5\n", "p.toml:1: write every rule under its own [[rule]] line"),
        ("\nrule = [{action = 'allow'}]\n", "p.toml:2: write every rule under its own"),
        ("[rule]\n", "p.toml:1: write every rule under its own [[rule]] line"),
        (RULE + "\n[[rules]]\n", "p.toml:4: unknown key 'rules'; did you mean 'rule'?"),
        ('\nunhandeld = "exit"\n' + RULE, "p.toml:2: unknown key 'unhandeld'; did you mean 'u"),
        (
            '\nunhandled = "injekt"\n' + RULE,
            "p.toml:2: unhandled is 'injekt', want one of inject, exit, skip;"
            " did you mean 'inject'?",
        ),
        ("unhandled = 5\n" + RULE, "p.toml:1: unhandled is 5, want one of inject, exit, skip"),
        ("unhandled = []\n" + RULE, "p.toml:1: unhandled is [], want one of inject, exit, skip"),
        (RULE + 'mnemonics = "nop"\n', "p.toml:3: unknown key 'mnemonics' in a rule; did"),
        (RULE, "p.toml:1: empty rule: give one of feature, mnemonic, form, bytes"),
        (RULE + "mnemonic = []\n", "p.toml:3: mnemonic is empty: name something or leave it out"),
        (RULE + 'mnemonic = ""\n', "p.toml:3: mnemonic is empty"),
        (RULE + 'bytes = ["90", " "]\n', "p.toml:3: bytes is empty"),
        ('[[rule]]\nmnemonic = "nop"\n', "p.toml:1: the rule has no action, want 'allow'"),
        (
            '[[rule]]\nmnemonic = "nop"\naction = "alow"\n',
            "p.toml:3: action is 'alow', want 'allow' or 'trap'; did you mean 'allow'?",
        ),
        ("[[rule]]\naction = true\n", "p.toml:2: action is True, want 'allow' or 'trap'"),
        (RULE + "mnemonic = 5\n", "p.toml:3: mnemonic is a number, want text or a list of texts"),
        (RULE + "form = [true]\n", "p.toml:3: form holds a boolean, want text only"),
        (RULE + "comment = 5\n", "p.toml:3: comment is a number, want text"),
        (
            RULE + 'mnemonic = [\n    "nop",\n    "popcount",\n]\n',
            "p.toml:5: unknown mnemonic 'popcount'; did you mean 'popcnt'?",
        ),
        (RULE + 'mnemonic = "invalid"\n', "p.toml:3: unknown mnemonic 'invalid'"),
        (RULE + 'mnemonic = "vpqqq*"\n', "p.toml:3: unknown mnemonic 'vpqqq*'"),
        (RULE + 'feature = "AVX3"\n', "p.toml:3: unknown feature 'AVX3'; did you mean 'AVX'?"),
        (RULE + 'feature = "sse42"\n', "p.toml:3: unknown feature 'sse42'; did you mean 'SSE4_2'?"),
        (RULE + 'feature = "SSE*"\n', "p.toml:3: unknown feature 'SSE*'"),
        (
            RULE + 'form = "VEX_Vpaddd_ymm_ymm_ymm256"\n',
            "p.toml:3: unknown form 'VEX_Vpaddd_ymm_ymm_ymm256'; "
            "did you mean 'VEX_VPADDD_YMM_YMM_YMMM256'?",
        ),
        (RULE + 'form = "INVALID"\n', "p.toml:3: unknown form 'INVALID'"),
        (RULE + 'bytes = "0f 3"\n', "p.toml:3: byte pattern '0f 3': want 1 to 15 whole"),
        (RULE + 'bytes = ["90", "xx"]\n', "p.toml:3: byte pattern 'xx': 'x' is no hex digit"),
        (
            RULE + 'mnemonic = "nop"\n[[rule]]\naction = "trap"\nmnemonic = ["pause", "nop"]\n',
            "p.toml:6: contradiction: mnemonic 'nop' has action 'allow' in the rule at line 1"
            " and 'trap' here",
        ),
        ('extends = "basline"\n', "p.toml:1: unknown policy 'basline'; did you mean"),
        ("extends = 5\n", "p.toml:1: extends is a number, want the name of one policy"),
        ('extends = "nowhere.toml"\n', "p.toml:1: nowhere.toml: cannot read this policy: "),
    ],
)
def test_a_bad_policy_is_refused_with_file_line_and_reason(text: str, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.parse(text, "p.toml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_lists_the_presets() -> None:
    with pytest.raises(PolicyError) as caught:
        Policy.load("basline")
    assert str(caught.value) == (
        f"unknown policy 'basline'; did you mean 'baseline'?; presets are {', '.join(presets())};"
        " a file is given by a path that ends in .toml"
    )


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"none\.toml: cannot read this policy: No such file"):
        Policy.load(tmp_path / "none.toml")
    with pytest.raises(PolicyError, match=r"cannot read this policy: Is a directory"):
        Policy.load(f"{tmp_path}/")


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_bytes(b"# one\n# \xff\n")
    with pytest.raises(PolicyError, match=r"p\.toml:2: a policy is UTF-8 text"):
        Policy.load(tmp_path / "p.toml")


@pytest.mark.parametrize("second", ["a.toml", "b.toml"])
def test_files_that_extend_each_other_are_refused(tmp_path: Path, second: str) -> None:
    (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
    (tmp_path / "b.toml").write_text(f'\nextends = "{second}"\n')
    with pytest.raises(PolicyError, match=r"b\.toml:2: extends goes in a circle: .* -> "):
        Policy.load(tmp_path / "a.toml")


def test_an_error_in_an_extended_file_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
    (tmp_path / "b.toml").write_text("\n\noops = 1\n")
    with pytest.raises(PolicyError, match=r"/b\.toml:3: unknown key 'oops'"):
        Policy.load(tmp_path / "a.toml")
