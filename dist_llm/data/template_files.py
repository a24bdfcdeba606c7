"""The chat templates that come with this package, a model's own, and any file that holds one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dist_llm.data.sandbox import LARGEST_TEMPLATE
from dist_llm.data.templates import Template
from dist_llm.errors import UsageError

LARGEST_CONFIG = 16 << 20  # bytes of a tokenizer_config.json

CHATML = """\
{%- for message in messages -%}
  {{- '<|im_start|>' + message.role + '\\n' -}}
  {%- if message.role == 'assistant' -%}
    {%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}
  {%- else -%}
    {{- message.content + '<|im_end|>' -}}
  {%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

QWEN = """\
{%- set default = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' -%}
{%- set first = messages[0].content if messages[0].role == 'system' else default -%}
{{- '<|im_start|>system\\n' + first -}}
{%- if tools -%}
  {{- '\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n' -}}
  {{- 'You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' -}}
  {%- for tool in tools -%}{{- '\\n' -}}{{- tool | tojson -}}{%- endfor -%}
  {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within ' -}}
  {{- '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- generation -%}
      {{- message.content or '' -}}
      {%- for tool_call in message.tool_calls -%}
        {{- '\\n' if message.content or not loop.first -}}
        {{- '<tool_call>\\n{"name": "' + tool_call.function.name + '", "arguments": ' -}}
        {{- tool_call.function.arguments | tojson -}}
        {{- '}\\n</tool_call>' -}}
      {%- endfor -%}
      {{- '<|im_end|>' -}}
    {%- endgeneration -%}
    {{- '\\n' -}}
  {%- elif message.role == 'tool' -%}
    {{- '<|im_start|>user' if loop.previtem is not defined or loop.previtem.role != 'tool' -}}
    {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
    {{- '<|im_end|>\\n' if loop.nextitem is not defined or loop.nextitem.role != 'tool' -}}
  {%- elif not (loop.first and message.role == 'system') -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
  {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}
  {%- if message.role == 'assistant' -%}
    {%- generation -%}{{- message.content | trim + '<|eot_id|>' -}}{%- endgeneration -%}
  {%- else -%}
    {{- message.content | trim + '<|eot_id|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

PLAIN = """\
{%- for message in messages -%}
  {{- {'system': 'System', 'user': 'User', 'assistant': 'Assistant'}[message.role] + ':\\n' -}}
  {%- if message.role == 'assistant' -%}
    {%- generation -%}{{- message.content + eos_token -}}{%- endgeneration -%}
  {%- else -%}
    {{- message.content -}}
  {%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}
"""

BUILT_IN = {"chatml": (CHATML, ""), "llama3": (LLAMA3, "<|begin_of_text|>"), "qwen": (QWEN, ""), "plain": (PLAIN, "")}  # text, bos


def choose_template(name: str, *, end: str, begin: str = "", tokenizer: Path | None = None) -> Template:
    """As `load_template`; auto: the model's own where there is one beside the tokenizer, else plain."""
    if name != "auto":
        return load_template(name, end=end, begin=begin, tokenizer=tokenizer)
    folder = None if tokenizer is None else tokenizer if tokenizer.is_dir() else tokenizer.parent
    return load_template("model" if folder is not None and _has_own(folder) else "plain", end=end, begin=begin, tokenizer=tokenizer)


def load_template(name: str, *, end: str, begin: str = "", tokenizer: Path | None = None) -> Template:
    """The template of a name: chatml, llama3, qwen, plain; model: what lies beside the tokenizer; or the path of a .jinja file.

    end: the token that ends a document, for templates that write it. begin: what stands before a text, as plain text is one.
    tokenizer: the tokenizer.json or its folder. Raises UsageError.
    """
    if name in BUILT_IN:
        text, bos = BUILT_IN[name]
        if name == "plain" and begin:
            text = f"{{{{- {json.dumps(begin, ensure_ascii=False)} -}}}}\n{text}"
        return Template(name, text, eos=end, bos=bos, trusted=True)
    folder = None if tokenizer is None else tokenizer if tokenizer.is_dir() else tokenizer.parent
    config = _read_config(folder / "tokenizer_config.json") if folder is not None else {}
    tokens: dict[str, Any] = {"eos": _token(config.get("eos_token")) or end, "bos": _token(config.get("bos_token"))}
    if name != "model":
        path = Path(name).expanduser()
        return Template(name, _read(path), where=str(path), **tokens)
    if folder is None:
        expected = "data.tokenizer.kind=file, and its path"
        raise UsageError("a model's own template lies beside its tokenizer", where="data.chat.template", expected=expected, found="no file")
    if (path := folder / "chat_template.jinja").is_file():
        return Template(name, _read(path), where=str(path), models=True, **tokens)
    where = folder / "tokenizer_config.json"
    named = _default(config.get("chat_template"))
    if named is None:
        expected = "chat_template.jinja, or chat_template in tokenizer_config.json"
        raise UsageError("there is no chat template beside the tokenizer", where=str(folder), expected=expected, found="neither", next=WAY)
    return Template(name, named, where=str(where), models=True, **tokens)


WAY = "the same command with data.chat.template=chatml, or llama3, qwen, plain, or the path of a .jinja file"


def _read(path: Path) -> str:
    """The text of a template's file. Raises UsageError."""
    if not path.is_file():
        expected = "chatml, llama3, qwen, plain, model, or a file"
        raise UsageError("there is no chat template", where=str(path), expected=expected, found="no such file", next=WAY)
    try:
        if path.stat().st_size > 4 * LARGEST_TEMPLATE:
            what, expected = "the chat template is too large to be one", f"at most {LARGEST_TEMPLATE} characters"
            raise UsageError(what, where=str(path), expected=expected, found=f"{path.stat().st_size} bytes", next=WAY)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UsageError("the chat template cannot be read", where=str(path), expected="text in UTF-8", found=found, next=WAY) from error


def _read_config(path: Path) -> dict[str, Any]:
    """What a tokenizer_config.json holds; nothing where it is not there. Raises UsageError where it cannot be read."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError("too large")
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        what, way = "the tokenizer's configuration cannot be read", f"mend {path}, then the same command again"
        raise UsageError(what, where=str(path), expected="a JSON object", found=str(error)[:160], next=way) from error
    return config


def _token(value: Any) -> str:
    """The name of a token, as a text or an object."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else ""


def _has_own(folder: Path) -> bool:
    """Whether a template lies in a tokenizer's folder."""
    if (folder / "chat_template.jinja").is_file():
        return True
    return _default(_read_config(folder / "tokenizer_config.json").get("chat_template")) is not None


def _default(value: Any) -> str | None:
    """The template called `default`, where there are several."""
    if isinstance(value, list):
        named = {one.get("name"): one.get("template") for one in value if isinstance(one, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
