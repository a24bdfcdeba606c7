"""What is wrong with the words of a command, said as every other failure is: the parser's own sentences are for its authors."""

from __future__ import annotations

import re
from typing import Any

from dist_llm.errors import UsageError

BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "less_than_equal": ("at most", "le"),
    "greater_than": ("more than", "gt"),
    "less_than": ("less than", "lt"),
}
KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "path": "a path"}


def misuse(error: Any, verb: str = "") -> UsageError:
    """The failure that a parser's exception means: what, where, expected, found, and the help of that verb.

    verb: the verb as the command names it, for exceptions that do not say.
    """
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else f"dist-llm {verb}".strip()
    flag = getattr(error, "option_name", None)
    said = getattr(error, "message", "") or error.format_message()
    kind = type(error).__name__
    facts: dict[str, Any] = {"where": where, "next": f"{where} --help"}
    if kind == "NoSuchOption":
        near = " or ".join(getattr(error, "possibilities", None) or ())
        known = [name for one in context.command.params for name in one.opts if name.startswith("--")] if context is not None else []
        facts["expected"] = f"one of {', '.join(known)}" if known else None
        return UsageError("there is no such flag", found=f"{flag}; did you mean {near}?" if near else str(flag), **facts)
    if kind == "BadOptionUsage" and flag:
        what = f"{flag} takes no value" if "not take" in said else f"{flag} needs a value"
        takes = what.endswith("takes no value")
        return UsageError(what, expected=flag if takes else f"{flag} VALUE", found=f"{flag}=..." if takes else flag, **facts)
    if kind == "MissingParameter":
        return UsageError(f"{_name(error)} is missing", expected=_form(context, where), found="nothing in its place", **facts)
    if kind == "BadParameter":
        facts["where"] = f"{where} {_name(error)}"
        facts["expected"], facts["found"] = _value(error, said)
        return UsageError("a value that cannot be taken", **facts)
    if unknown := re.match(r"No such command '(.*?)'\.(?: Did you mean (.*)\?)?", said, re.DOTALL):
        held = (
            [name for name, one in getattr(context.command, "commands", {}).items() if not getattr(one, "hidden", False)] if context else []
        )
        near = (unknown[2] or "").replace("'", "").replace(", ", " or ")
        expected = f"one of {', '.join(held)}" if held else None
        return UsageError(
            "there is no such verb", expected=expected, found=f"{unknown[1]}; did you mean {near}?" if near else unknown[1], **facts
        )
    if extra := re.match(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", said, re.DOTALL):
        return UsageError("there are more words than the verb takes", expected=_form(context, where), found=extra[1], **facts)
    lines = error.format_message().split("\n")
    return UsageError(lines[0], details=lines[1:], **facts)


def _form(context: Any, where: str) -> str | None:
    """The words that a verb takes, as its help shows them."""
    if context is None:
        return None
    return " ".join([where, *(one.metavar or one.name.upper() for one in context.command.params if one.param_type_name == "argument")])


def _name(error: Any) -> str:
    """The flag, or the name of the argument as help shows it."""
    parameter = getattr(error, "param", None)
    if parameter is None:
        return str(getattr(error, "param_hint", None) or "a word")
    flags = [word for word in parameter.opts if word.startswith("-")]
    return flags[0] if flags else str(getattr(parameter, "metavar", None) or parameter.name.upper())


def _value(error: Any, said: str) -> tuple[str, str | None]:
    """What a value had to be, and what it was. By the checks behind the parser where there are some, else by its sentence."""
    errors = getattr(error.__cause__, "errors", None)
    for fault in errors() if callable(errors) else ():
        kind, found = str(fault.get("type", "")), str(fault.get("input", ""))
        if kind in BOUNDS:
            words, key = BOUNDS[kind]
            return f"{words} {fault['ctx'][key]:g}", found
        if (expected := KINDS.get(kind.split("_")[0])) is not None:
            return expected, found
    if bound := re.match(r"(.*) is not in the range x(.=)(.*)\.", said):
        return f"{'at least' if bound[2] == '>=' else 'at most'} {bound[3]}", bound[1]
    if wrong := re.match(r"'(.*)' is not a valid (\w+)", said, re.DOTALL):
        return {"integer": "a whole number", "float": "a number"}.get(wrong[2], f"a {wrong[2]}"), wrong[1]
    return said, None
