"""Is an answer right? A function for each matcher but the simplest; :mod:`slmops.evaluation.scoring` picks one.

A matcher says right or wrong, or a degree between them. What cannot be judged is unscored, with the reason, and never
counts as wrong.
"""

import contextlib
import importlib.util
import inspect
import json
import re
import string
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from slmops.core.errors import UsageError
from slmops.core.values import Frozen

RIGHT_FROM = 0.5  # score from which an answer counts as right, unless the item names another
SEARCHED_CHARACTERS = 20_000  # how much of an answer a regular expression is shown
MATCHER_MODULE = "_slmops_matcher"

Function = Callable[[str, str], Any]


class Judgement(Frozen):
    score: float | None = Field(None, ge=0, le=1, description="None: it could not be judged.")
    correct: bool | None = None
    reason: str | None = Field(None, description="Why it could not be judged.")

    @classmethod
    def of(cls, correct: bool) -> Self:
        """Right or wrong, from a matcher that has no degrees."""
        return cls(score=float(correct), correct=correct)

    @classmethod
    def graded(cls, score: float, threshold: float | None) -> Self:
        """A degree from 0 to 1, right from the threshold on."""
        return cls(score=score, correct=score >= (RIGHT_FROM if threshold is None else threshold))


def regex(expected: str, answer: str) -> bool:
    """Found in the first 20,000 characters of the answer; nested repeats such as ``(a+)+$`` can still take forever."""
    return re.search(expected, answer[:SEARCHED_CHARACTERS]) is not None


def full_regex(expression: str, answer: str) -> bool:
    """The expression matches the whole answer, apart from outer blanks; it never matches over 20,000 characters."""
    text = answer.strip()
    return len(text) <= SEARCHED_CHARACTERS and re.fullmatch(expression, text) is not None


def number(text: str) -> Decimal | None:
    """The last number of a text: an answer may repeat the numbers of its question first."""
    # A hyphen after a letter or digit is not a sign: GPT-4, 3-5.
    found = re.findall(r"(?:(?<!\w)-)?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", text))
    return Decimal(found[-1]) if found else None


def is_number(text: str) -> bool:
    """The whole text is one number, such as -1,234.5; outer blanks and a final period are allowed."""
    return re.fullmatch(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?\.?", text.strip()) is not None


def numeric(expected: str, answer: str, tolerance: float = 0.0) -> bool:
    """The last number of the answer is within ``tolerance`` of the expected one; in binary, 1.1 - 1.0 > 0.1."""
    wanted, found = number(expected), number(answer)
    return wanted is not None and found is not None and abs(found - wanted) <= Decimal(repr(tolerance))


def parse_json(text: str) -> Any:
    """Strict JSON, without Python's NaN and Infinity; ValueError if it is anything else."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_json(text: str) -> bool:
    """The whole text is one JSON document, without a code fence."""
    with contextlib.suppress(ValueError):
        parse_json(text)
        return True
    return False


def document(answer: str) -> Any:
    """The JSON document that an answer is, or that its first code fence holds; ValueError if there is none."""
    try:
        return parse_json(answer)
    except ValueError:
        for language, content in re.findall(r"```(\w*)(.*?)(?:```|\Z)", answer, re.DOTALL):
            if language.lower() in ("", "json"):
                return parse_json(content)
        raise


def json_schema(schema: dict[str, Any], expected: str, answer: str) -> Judgement:
    """The answer is a document, fenced or not, that validates and equals ``expected``, if given: 1 is 1.0, not true."""
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    try:
        found = document(answer)
    except ValueError:
        return Judgement.of(False)
    try:
        # An empty registry, so that no $ref makes it fetch anything from the network.
        valid = _validator(schema)(schema, registry=Registry()).is_valid(found)
        same = not expected or _validator({})({"const": parse_json(expected)}).is_valid(found)
    except (Unresolvable, RecursionError, re.error, ArithmeticError) as error:
        return Judgement(reason=f"the schema cannot be applied: {error}")
    return Judgement.of(bool(valid and same))


def as_answer(calls: Sequence[Mapping[str, Any]]) -> str:
    """Tool calls, each with name and arguments (an object, or its JSON), as the text of an answer.

    The runtime also passes on arguments that are not JSON, and these stay as they are.
    """

    def read(arguments: Any) -> Any:
        return parse_json(arguments) if isinstance(arguments, str) and is_json(arguments) else arguments

    written = [{"name": call["name"], "arguments": read(call["arguments"])} for call in calls]
    return json.dumps({"tool_calls": written}, ensure_ascii=False)


def tool_call(expected: str, answer: str) -> bool:
    """The answer is the expected call, or all of several in their order, as :func:`as_answer` writes them: 1 is 1.0."""
    try:
        found, wanted = parse_json(answer)["tool_calls"], parse_json(expected)
    except (ValueError, LookupError, TypeError):
        return False
    return bool(_validator({})({"const": wanted if isinstance(wanted, list) else [wanted]}).is_valid(found))


def schema_problem(schema: dict[str, Any]) -> str | None:
    """Why ``schema`` is not a JSON Schema, or None."""
    from jsonschema import SchemaError  # type: ignore[import-untyped]

    try:
        _validator(schema).check_schema(schema)
    except SchemaError as error:
        return f"{error.message} at {error.json_path}"
    except RecursionError:
        return "nested too deeply"
    return None


def rouge_l(expected: str, answer: str) -> float:
    """F-measure of the longest common subsequence of words (Lin 2004, ROUGE) of a-z and 0-9, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    return float(RougeScorer(["rougeL"]).score(expected, answer)["rougeL"].fmeasure)


def squad_words(text: str) -> list[str]:
    """Words in the sense of SQuAD's evaluation script: lower case, without ASCII punctuation and a, an, the."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def f1(expected: str, answer: str) -> float:
    """F1 of the bags of words (Rajpurkar et al. 2016, SQuAD, section 6.1): 2PR / (P + R)."""
    wanted, found = Counter(squad_words(expected)), Counter(squad_words(answer))
    shared = (wanted & found).total()
    return 2 * shared / (wanted.total() + found.total()) if shared else 0.0


def python(function: Function, expected: str, answer: str, threshold: float | None = None) -> Judgement:
    """What the user's function says; unscored if it raises or returns something else. It never ends the run."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for data
            said = function(expected, answer)
        if not isinstance(said, bool | int | float) and hasattr(said, "item"):
            said = said.item()  # NumPy's scalars
        if isinstance(said, bool):
            return Judgement.of(said)
        if isinstance(said, int | float) and 0 <= said <= 1:
            return Judgement.graded(float(said), threshold)
        return Judgement(reason=f"the function returned {said!r:.50}, which is neither a bool nor a number from 0 to 1")
    except (Exception, SystemExit) as error:
        file = getattr(getattr(function, "__code__", None), "co_filename", "")
        return Judgement(reason=f"the function raised {_described(error, file)}")


def load_function(spec: str) -> Function:
    """The user's function of ``FILE.py:FUNCTION``, called with (expected, answer); UsageError if it cannot be.

    It runs the file, which the user named: an evaluation set from elsewhere can ask for the function but not name it.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file).expanduser().resolve()
    fix = "Give FILE.py:FUNCTION, a function of (expected, answer) that returns a bool or a number from 0 to 1."
    if not path.is_file():
        raise UsageError(f"There is no file {file or spec} for the matcher.", fix)
    found = importlib.util.spec_from_file_location(MATCHER_MODULE, path)
    if found is None or found.loader is None:
        raise UsageError(f"The matcher's file {file} is not a Python file.", fix)
    module = importlib.util.module_from_spec(found)
    sys.modules[MATCHER_MODULE] = module  # dataclasses look themselves up there
    try:
        with contextlib.redirect_stdout(sys.stderr):
            found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[MATCHER_MODULE]
        raise UsageError(f"The matcher's file {file} does not import: {_described(error, str(path))}", fix) from None
    function: Function | None = getattr(module, name, None)
    if function is None:
        raise UsageError(f"The matcher's file {file} has no function {name}.", fix)
    if not callable(function):
        raise UsageError(f"{name} in the matcher's file {file} is not a function: {type(function).__name__}.", fix)
    with contextlib.suppress(ValueError):  # some built-ins have no signature
        try:
            inspect.signature(function).bind("expected", "answer")
        except TypeError as error:
            raise UsageError(f"{name} in {file} cannot be called with (expected, answer): {error}.", fix) from None
    return function


def _described(error: BaseException, file: str) -> str:
    """An error of the user's code with the line of the user's file that it comes from."""
    # Not str(error), which can raise.
    said = traceback.format_exception_only(error)[0].strip().removeprefix(f"{MATCHER_MODULE}.")
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError):
        said = f"{type(error).__name__}: {error.msg}"
        lines += [error.lineno] if error.filename == file else []
    return said + (f" in line {lines[-1]}" if lines else "")


def _validator(schema: dict[str, Any]) -> Any:
    """The class for the draft that the schema names, the latest if it names none."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for  # type: ignore[import-untyped]

    return validator_for(schema, default=Draft202012Validator)
