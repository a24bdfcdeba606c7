"""The HTML of the two report pages, as jinja2 templates that are always rendered with autoescape on."""

BASE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
{% macro fact_list(facts) %}
<dl class="facts">{% for name, value in facts %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>{% endfor %}</dl>
{% endmacro %}
{% macro figure(name) %}<div class="figure" data-figure="{{ name }}"></div>{% endmacro %}
{% block content %}{% endblock %}
<footer>Written by dist-llm {{ version }}. This page is complete in itself and loads nothing.</footer>
</main>
{% if figures %}
<script type="application/json" id="figures">{{ figures }}</script>
<script>{{ plotly }}</script>
<script>{{ script }}</script>
{% endif %}
</body>
</html>
"""

COMPARISON = """{% extends "base" %}
{% block content %}
<h1>{{ title }}</h1>
<section class="verdict {{ verdict.state }}">
<p class="sentence"><span class="mark" aria-hidden="true">{{ {"equal": "✓", "differs": "✗"}.get(verdict.state, "?") }}</span>
{{- verdict.sentence }}</p>
{% if verdict.findings %}<ul class="findings">{% for name, finding in verdict.findings %}
<li><b>{{ name }}</b> {{ finding }}</li>{% endfor %}</ul>{% endif %}
{{ fact_list(facts) }}
</section>

{% if "proof" in drawn or "losses" in drawn %}
<section>
<h2>Loss</h2>
<p class="note">Curves that coincide are drawn as one striped line with a stripe of every layout; a curve that departs is drawn whole.</p>
<div class="chips">{% for row in rows %}{% if row.has_loss %}
<button class="chip" type="button" aria-pressed="true" data-row="{{ loop.index0 }}"><span class="swatch s{{ row.colour }}"></span>
{{- row.label }}</button>{% endif %}{% endfor %}</div>
<div class="pair">
{% if "losses" in drawn %}<div><h3>Training</h3>{{ figure("losses") }}</div>{% endif %}
{% if "proof" in drawn %}<div><h3>Equality proof</h3>{{ figure("proof") }}</div>{% endif %}
</div>
</section>
{% endif %}

{% if "differences" in drawn %}
<section>
<h2>Differences</h2>
<p class="note">Largest relative difference from {{ reference }} over all steps and tensors of a kind; left of the red line is equal.</p>
{{ figure("differences") }}
</section>
{% endif %}

{% if rows %}
<section>
<h2>Layouts</h2>
<p class="note">Click a heading to sort. Memory is the peak of the fullest rank, bytes are what one rank sends in a step.</p>
<div class="scroll"><table class="sortable">
<thead><tr class="group"><td colspan="2"></td><th colspan="4" scope="colgroup">largest difference</th><td colspan="5"></td></tr>
<tr>{% for name, kind in columns %}
<th class="{{ kind }}" scope="col"><button type="button">{{ name }}</button></th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}<tr>
<td data-value="{{ row.label }}"><div><span class="swatch s{{ row.colour }}"></span><div>
{{- "" }}<span class="name">{{ row.label | breakable }}</span>
{%- if row.under %}<small>{{ row.under | breakable }}</small>{% endif %}</div></div></td>
<td class="text {{ row.tone }}" data-value="{{ row.order }}">{{ row.outcome }}</td>
{% if row.error %}<td class="wide text" colspan="{{ columns|length - 2 }}">{{ row.error }}</td>
{% else %}{% for cell in row.cells %}<td data-value="{{ cell.value }}" class="{{ cell.tone }}">{{ cell.text }}
{%- if cell.under %}<small>{{ cell.under }}</small>{% endif %}</td>
{% endfor %}{% endif %}</tr>
{% endfor %}</tbody>
</table></div>
</section>
{% endif %}

{% if "memory" in drawn %}
<section>
<h2>Memory per rank</h2>
<p class="note">Bars are predicted: the fullest moment of the fullest rank, by what holds the bytes.
Each mark is the measured peak of one rank; host memory is in it where it is the device's.</p>
{{ figure("memory") }}
</section>
{% endif %}

{% if "bytes" in drawn %}
<section>
<h2>Bytes sent per step</h2>
<p class="note">By mesh axis, for one rank: measured, and below it predicted (hatched).</p>
{{ figure("bytes") }}
</section>
{% endif %}

{% if "spans" in drawn %}
<section>
<h2>One step in time</h2>
<p class="note">Every action of every rank: measured above, simulated from the same schedule below.
The number is the micro-batch, paler bars are a rank's second chunk, thin lines are communication.</p>
<label>Layout <select id="pick">{% for name in spans %}<option value="{{ loop.index0 }}">{{ name }}</option>{% endfor %}</select></label>
{{ figure("spans") }}
<p class="note" id="caption"></p>
</section>
{% endif %}

{% if command or environment %}
<section>
<h2>How to reproduce</h2>
{% if command %}<pre><code>{{ command }}</code></pre>{% endif %}
{% if environment %}{{ fact_list(environment) }}{% endif %}
</section>
{% endif %}
{% endblock %}
"""

RUN = """{% extends "base" %}
{% block content %}
<h1>{{ title }}</h1>
<section class="verdict {{ "equal" if drawn else "unknown" }}">
<p class="sentence">{{ sentence }}</p>
{{ fact_list(facts) }}
{% if unreadable %}<p class="note">Lines of metrics.jsonl that could not be read and are left out: {{ unreadable }}.</p>{% endif %}
</section>

{% if "loss" in drawn %}
<section>
<h2>Loss</h2>
{{ figure("loss") }}
</section>
{% endif %}

{% set asked, marks = answers %}
{% if marks %}
<section>
<h2>Right answers</h2>
<p class="note">Questions that were held out from training: exact answers, their share, and its 95 % interval.</p>
<div class="scroll"><table>
<thead><tr><th class="text" scope="col">task</th>{% for heading in asked %}<th scope="col">{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in marks %}<tr>{% for cell in row %}<td{% if loop.first %} class="text"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
</section>
{% endif %}

{% set small = [("reward_margin", "Reward margin"), ("accuracy", "Pairs right"), ("grad_norm", "Gradient norm"),
  ("learning_rate", "Learning rate"), ("tokens_per_second", "Tokens per second"), ("memory", "Peak memory")] %}
{% if small | map("first") | select("in", drawn) | list %}
<section>
<h2>Steps</h2>
<div class="pair">{% for name, heading in small %}{% if name in drawn %}
<div><h3>{{ heading }}</h3>{{ figure(name) }}</div>{% endif %}{% endfor %}</div>
</section>
{% endif %}

{% if samples %}
<section>
<h2>Samples</h2>
<p class="note">What the model wrote during the run; the prompt is bold.</p>
{% for step, prompt, text in samples %}
<div class="sample"><div class="step">step {{ step }}</div><div class="words"><b>{{ prompt }}</b>{{ text }}</div></div>
{% endfor %}</section>
{% endif %}

{% if config %}
<section>
<h2>How to reproduce</h2>
<p class="note">config.yaml as resolved; it is itself a valid config.</p>
<pre><code>{{ config }}</code></pre>
</section>
{% endif %}
{% endblock %}
"""
