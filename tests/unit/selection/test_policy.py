"""The policy file: what it may say, and what is said about what it may not."""

from pathlib import Path
from typing import Any

import pytest

from slmops.core.errors import UsageError
from slmops.core.job import BASELINE, SHIPPED
from slmops.selection import policy
from slmops.selection.policy import Gate, Policy

TOML = """
objective = "fastest"
preference = ["int8", "mine"]
gates = [
    {metric = "kl_mean", max = 1e-2},
    {metric = "accuracy.big", of = "ratio", to = "champion", min = 0.9, inconclusive = "accept", advisory = true},
]
"""
YAML = """
objective: fastest
preference: [int8, mine]
gates:
  - {metric: kl_mean, max: 1e-2}
  - {metric: accuracy.big, of: ratio, to: champion, min: 0.9, inconclusive: accept, advisory: true}
"""
BOTH = Policy(
    objective="fastest",
    preference=("int8", "mine"),
    gates=(
        Gate(metric="kl_mean", max=0.01),
        Gate(metric="accuracy.big", of="ratio", to="champion", min=0.9, inconclusive="accept", advisory=True),
    ),
)


def write(folder: Path, text: str | bytes, name: str = "p.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path: Path) -> list[str]:
    """The lines of what is said when ``path`` is loaded."""
    with pytest.raises(UsageError) as caught:
        policy.load(path)
    assert str(path) in caught.value.message
    assert caught.value.fix
    return caught.value.message.splitlines()


@pytest.mark.parametrize(
    ("name", "text"), [("p.toml", TOML), ("P.TOML", TOML), ("p.yaml", YAML), ("p.yml", YAML), ("policy", YAML)]
)
def test_toml_and_yaml_say_the_same(tmp_path: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert policy.load(write(tmp_path, text, name)) == BOTH
    monkeypatch.setenv("HOME", str(tmp_path))
    assert policy.load(Path(f"~/{name}")) == BOTH


def test_packaged_policy() -> None:
    made = policy.load()
    assert made == policy.load(policy.PACKAGED)
    assert (made.objective, made.preference) == ("preference", ("int4", "int8", "fp16"))
    assert set(made.preference) <= set(SHIPPED) - {BASELINE}
    assert [(gate.text, gate.inconclusive, gate.advisory) for gate in made.gates] == [
        ("perplexity at most 1.1 times the baseline's", "refuse", False),
        ("hf_kl_mean at most 0.1", "accept", False),
        ("hf_top1_agreement at least 0.8", "accept", False),
        ("accuracy at most 0.1 below the baseline's", "accept", False),
        ("edge_cases_passed not below the baseline's", "accept", False),
        ("accuracy at most 0.1 below the champion's", "accept", False),
        ("perplexity at most 1.1 times the champion's", "accept", False),
        ("decode_consistency at least 0.5", "refuse", True),
    ]


KNOWN = ("kl_p99", "itl_ms_p90", "throughput_tok_s_c4", "accuracy.Größe & <mass>")


@pytest.mark.parametrize(
    ("gate", "text"),
    [
        ({"max": 1.1}, "accuracy at most 1.1"),
        ({"min": 0}, "accuracy at least 0"),
        ({"of": "ratio", "to": "baseline", "max": 1.1}, "accuracy at most 1.1 times the baseline's"),
        ({"of": "difference", "to": "baseline", "max": 0.1}, "accuracy at most 0.1 above the baseline's"),
        ({"of": "difference", "to": "baseline", "max": -0.1}, "accuracy at least 0.1 below the baseline's"),
        ({"of": "difference", "to": "baseline", "min": 0.1}, "accuracy at least 0.1 above the baseline's"),
        ({"of": "difference", "to": "champion", "min": -0.1}, "accuracy at most 0.1 below the champion's"),
        ({"of": "difference", "to": "champion", "min": 0}, "accuracy not below the champion's"),
        ({"of": "difference", "to": "champion", "max": 0}, "accuracy not above the champion's"),
        *(({"metric": metric, "max": 1}, f"{metric} at most 1") for metric in KNOWN),
    ],
)
def test_a_gate_in_words(gate: dict[str, Any], text: str) -> None:
    made = Gate(**{"metric": "accuracy", **gate})
    assert (made.text, made.limit) == (text, gate.get("max", gate.get("min")))


# A gate, its metric as the message has it, and what else has to appear there; without a metric, something else.
WRONG = """
{max: 1}                                                 | no metric | metric is missing
{metric: 7, max: 1}                                      | 7         | metric 7
{metric: perplexty, max: 1}                              | perplexty | 'perplexty' perplexity perplexity_ratio
{metric: accuracy., max: 1}                              | accuracy. | 'accuracy.' accuracy
{metric: xyz, max: 1}                                    | xyz       | 'xyz' accuracy, accuracy.CATEGORY,
{metric: accuracy}                                       | accuracy  | one max min
{metric: accuracy, max: 1, min: 0}                       | accuracy  | one max min
{metric: accuracy, max: high}                            | accuracy  | max 'high'
{metric: accuracy, max: .inf}                            | accuracy  | max finite inf
{metric: accuracy, max: 1, of: ratio, to: fp16}          | accuracy  | to 'baseline' 'champion' 'fp16'
{metric: accuracy, max: yes}                             | accuracy  | max True
{metric: accuracy, max: 1, of: ratio}                    | accuracy  | 'of' 'ratio' 'to' 'baseline' 'champion'
{metric: accuracy, max: 1, to: baseline}                 | accuracy  | 'to' 'baseline' 'of' 'difference' 'ratio'
{metric: accuracy, max: 0, of: ratio, to: baseline}      | accuracy  | ratio above 0
{metric: accuracy, max: 1, advisory: maybe}              | accuracy  | advisory 'maybe'
{metric: accuracy, maxx: 1}                              | accuracy  | 'maxx'; max?
perplexity                                               | no metric | table 'perplexity'
objective: best                                          |           | objective 'fastest' 'best_quality', 'best'
prefrence: [int4]                                        |           | 'prefrence'; preference?
7: int4                                                  |           | '7'; gates, objective, preference
preference: int4                                         |           | preference list, 'int4'
preference: [int4, int8, int4]                           |           | preference int4 once
preference: [my model]                                   |           | preference.1
gates: {metric: kl_mean, max: 1}                         |           | gates list, [[gates]]
"""


@pytest.mark.parametrize("line", WRONG.strip().splitlines())
def test_what_is_wrong(tmp_path: Path, line: str) -> None:
    value, metric, words = (part.strip() for part in line.split("|"))
    heading, problem = refusal(write(tmp_path, f"gates: [{value}]" if metric else value))
    assert "p.yaml" in heading
    assert problem.startswith(f"  gate 1 ({metric}): " if metric else "  ")
    assert all(word in problem for word in words.split()), problem


def test_everything_is_named_at_once(tmp_path: Path) -> None:
    wrong = "{metric: accuracy, max: 1, min: 1}, {metric: kl_maen, of: quotient, max: 1}"
    text = f"{{objective: best, gates: [{{metric: kl_mean, max: 1}}, {wrong}]}}"
    starts = ["objective must", "gate 2 (accuracy): give", "gate 3 (kl_maen): there is", "gate 3 (kl_maen): of must"]
    _, *problems = refusal(write(tmp_path, text))
    assert [problem.strip()[: len(start)] for problem, start in zip(problems, starts, strict=True)] == starts


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.toml", "objective = ", "cannot be read: Invalid value (at "),
        ("p.yaml", "gates: [", "cannot be read: while parsing"),
        ("p.toml", "# nothing", "has no keys and values"),
        ("p.yaml", "", "has no keys and values"),
        ("p.yaml", "- int4", "has no keys and values"),
        ("p.toml", b"\xff\xfe", "cannot be read: 'utf-8' codec can't decode"),
        ("none.toml", None, "cannot be read: [Errno 2] No such file"),
        ("", None, "cannot be read: [Errno 21] Is a directory"),
        ("~nobody-has-this-name/p.toml", None, "cannot be read: Could not determine home directory"),
    ],
)
def test_file_that_is_no_policy(tmp_path: Path, name: str, text: str | bytes | None, said: str) -> None:
    if text is not None:
        write(tmp_path, text, name)
    (line,) = refusal(Path(name) if name.startswith("~") else tmp_path / name)
    assert f"{name} {said}" in line
