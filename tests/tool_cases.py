"""Chat templates of the kinds in the field that show tools and reasoning, in our own words, and conversations for them."""

from __future__ import annotations

import json
from typing import Any

from dist_llm.data.templates import Template

HEAD = (
    "{% set first = messages[0].content if messages[0].role == 'system' else 'You help.' %}{{ '<|im_start|>system\\n' + first }}"
    "{% if tools %}{{ '\\n\\n# Tools\\n<tools>' }}{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}{{ '\\n</tools>' }}"
    "{% endif %}{{ '<|im_end|>\\n' }}"
)
RESULTS = (
    "{{ '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' }}"
    "{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{{ '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' }}"
)
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CALLS = (
    "{% for call in m.tool_calls %}{% set call = call.function if call.function is defined else call %}"
    "{{ ('\\n' if m.content or not loop.first) ~ '<tool_call>\\n{\"name\": \"' + call.name + '\", \"arguments\": ' }}"
    "{{ (call.arguments | tojson) + '}\\n</tool_call>' }}{% endfor %}"
)
OTHER = (
    "{% elif m.role == 'tool' %}"
    + RESULTS
    + "{% elif m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}{% endif %}"
)
MARKED: dict[str, str] = {
    # Qwen2.5 and Hermes: calls as JSON between tags, results in a user's turn.
    "qwen2.5": HEAD + "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ m.content or '' }}" + CALLS + "{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}" + OTHER + "{% endfor %}" + ASK,
    # Qwen3: reasoning too, which turns before the last question lose.
    "qwen3": HEAD + "{% set ns = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}"
    "{% set thought = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{% if loop.index0 > ns.asked and (loop.last or thought) %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content if m.content is string else '' }}" + CALLS + "{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}" + OTHER
    + "{% endfor %}" + ASK,
    # Llama 3.1: one call a turn, its content not shown; tools in the first user's turn; results of the role ipython, as JSON.
    "llama3.1": "{{ bos_token }}{% set ns = namespace(told=false) %}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% generation %}{% if 'tool_calls' in m %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}{{ '<|python_tag|>{\"name\": \"' + call.name + '\", \"parameters\": ' }}"
    "{{ (call.arguments | tojson) + '}<|eom_id|>' }}{% else %}{{ (m.content | trim) + '<|eot_id|>' }}{% endif %}{% endgeneration %}"
    "{% else %}{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\\n\\n' }}"
    "{% if m.role == 'user' and tools and not ns.told %}{% set ns.told = true %}{{ 'Given the following functions:\\n' }}"
    "{% for t in tools %}{{ (t | tojson(indent=4)) + '\\n\\n' }}{% endfor %}{% endif %}"
    "{{ ((m.content | tojson) if m.role == 'tool' else (m.content | trim)) + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
}  # fmt: skip
BOS = {"llama3.1": "<|begin_of_text|>"}
XML = (  # names and values side by side with what the template writes, as Qwen3-Coder has them
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}{% for call in m.tool_calls or [] %}"
    "{{ '<function=' + call.function.name + '>' }}{% for key, value in call.function.arguments | items %}"
    "{{ '<parameter=' + key + '>' }}{{ value if value is string else value | tojson }}{{ '</parameter>' }}{% endfor %}</function>"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + ASK
)


def template(kind: str, *, marked: bool = True) -> Template:
    """One of MARKED, with or without its marks."""
    text = MARKED[kind] if marked else MARKED[kind].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    return Template(kind, text, eos="<|endoftext|>", bos=BOS.get(kind, ""), trusted=True)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """A call as transformers has it."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def calls(*made: dict[str, Any], content: str = "", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(made), **more}


def says(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def result(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": text, **more}


WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'What the weather is, "now" or later: 3 °C \\ rain\n',
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "A town."},
                "at": {"type": "object", "properties": {"hour": {"type": "integer", "description": "0 to 23"}}},
                "unit": {"type": "string", "enum": ["C", "F"]},
            },
            "required": ["place"],
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": {"type": "object"}}}
ONE = [user("How warm is it in Oslo?"), calls(call("weather", place="Oslo", at={"hour": 9}, unit=None)), result('{"t": 3}'), says("3 °C.")]
TWO = [user("And when?"), calls(call("clock")), result('nine o\'clock \\u0000< \\ "x"'), says("At nine.")]
TALKS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "one": (ONE, [WEATHER]),
    "two": ([{"role": "system", "content": "Be kind."}, *ONE, *TWO], [WEATHER, CLOCK]),
    "without calls": ([user("Hi"), says("Hello")], [CLOCK]),
    "ends with a call": (TWO[:2], [CLOCK]),
    "without tools": (ONE, []),
}
MORE: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {  # which Llama 3.1's kind cannot show
    "side by side": (
        [user("Both?"), calls(call("weather", place="Ås", z=1, a=[1.5, True, None, {"b": "é"}]), call("clock"), content="Both."),
         result("3"), result(""), says("3, and nine.")],
        [WEATHER, CLOCK],
    ),
}  # fmt: skip
THOUGHT = [
    user("How warm is it in Oslo?"), calls(call("weather", place="Oslo"), reasoning_content="I need the weather.\n"),
    result("3"), says("3 °C.", reasoning_content="It is three."),
]  # fmt: skip


NOT_SHOWN = (  # by a template that knows none of it, one line of JSON each
    json.dumps({"messages": [user("a"), says("b")], "tools": [{"name": "f"}]}),
    json.dumps({"messages": [user("a"), {**calls({"function": {"name": "f", "arguments": "{}"}}), "content": None}]}),
    json.dumps({"messages": [user("a"), says("b", reasoning_content="c")]}),
)


def talks(kind: str) -> dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """The conversations that a kind of template shows whole, each with its tools."""
    thoughts = {"thought": (THOUGHT, [WEATHER])} if kind == "qwen3" else {}
    return TALKS | ({} if kind == "llama3.1" else MORE) | thoughts


def copied(value: Any) -> Any:
    return json.loads(json.dumps(value))
