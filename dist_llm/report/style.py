"""The style sheet of the report: system fonts, one column, a light and a dark theme.

Figures take their colours from the same variables: --series-N is layout N, --part-N is category N.
"""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1c2430; --muted: #667085; --line: #e3e7ed; --hover: #f2f5f9;
  --good: #1a7f4b; --good-soft: #e7f5ed; --bad: #c9352b; --bad-soft: #fdeceb; --warn: #946200; --warn-soft: #fdf3dc;
  --accent: #2f62c9;
  --series-1: #2f62c9; --series-2: #e0782f; --series-3: #2a9568; --series-4: #c4447a; --series-5: #7f58cc;
  --series-6: #1593ae; --series-7: #b3861a; --series-8: #cf4a40; --series-9: #66891d; --series-10: #76675b;
  --series-11: #3f4a9e; --series-12: #0f7566;
  --part-1: #5479b8; --part-2: #e3a457; --part-3: #6fb08a; --part-4: #b08cc8; --part-5: #d9857f; --part-6: #a3adba;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1a2029; --ink: #e6eaf0; --muted: #98a3b3; --line: #2c3440; --hover: #212936;
    --good: #5fcf95; --good-soft: #17332a; --bad: #ff8177; --bad-soft: #3b2022; --warn: #e9b949; --warn-soft: #352c17;
    --accent: #84aaff;
    --series-1: #7aa2f7; --series-2: #f29e5c; --series-3: #57c795; --series-4: #ef7fae; --series-5: #b295f0;
    --series-6: #4fc3dc; --series-7: #ddb548; --series-8: #f47d72; --series-9: #a3c653; --series-10: #b8a797;
    --series-11: #8f9bea; --series-12: #3fb3a0;
    --part-1: #6f95d6; --part-2: #dba052; --part-3: #6bb38b; --part-4: #b292cf; --part-5: #d5837d; --part-6: #7b8696;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", Arial, sans-serif;
}
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 56px; }
h1 { font-size: 15px; font-weight: 600; color: var(--muted); margin: 0 0 14px; overflow-wrap: anywhere; }
h2 { font-size: 18px; font-weight: 650; margin: 0 0 2px; }
p { margin: 0; }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 13px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px 22px; margin-top: 18px; }
.note { color: var(--muted); margin-bottom: 10px; max-width: 110ch; }
.verdict { border-left: 6px solid var(--warn); background: var(--card); padding: 18px 22px; margin: 0; }
.verdict.equal { border-left-color: var(--good); }
.verdict.differs { border-left-color: var(--bad); }
.verdict .sentence { font-size: 24px; line-height: 1.3; font-weight: 650; letter-spacing: -0.01em; overflow-wrap: anywhere; }
.verdict .mark { margin-right: 8px; }
.equal .mark, .good { color: var(--good); }
.differs .mark, .bad { color: var(--bad); }
.unknown .mark, .warn { color: var(--warn); }
.findings { margin: 12px 0 0; padding: 0; list-style: none; }
.findings li { padding: 6px 0; border-top: 1px solid var(--line); overflow-wrap: anywhere; white-space: pre-line; }
.facts { display: flex; flex-wrap: wrap; gap: 10px 30px; margin: 16px 0 0; }
.facts div { min-width: 0; }
.facts dt { color: var(--muted); font-size: 12.5px; }
.facts dd { margin: 0; font-weight: 550; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 8px 24px; }
.pair > div { min-width: 0; }
h3 { font-size: 14px; font-weight: 600; margin: 10px 0 0; }
.figure { width: 100%; min-height: 60px; }
.chips { display: flex; flex-wrap: wrap; gap: 6px; margin: 4px 0 8px; }
.chip {
  font: inherit; font-size: 13px; color: var(--ink); background: none; border: 1px solid var(--line); border-radius: 999px;
  padding: 2px 10px 2px 8px; cursor: pointer; max-width: 100%; overflow-wrap: anywhere; text-align: left;
}
.chip:hover { background: var(--hover); }
.chip[aria-pressed=false] { color: var(--muted); text-decoration: line-through; }
.chip[aria-pressed=false] .swatch { opacity: 0.25; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 7px; flex: none; }
.s1 { background: var(--series-1); } .s2 { background: var(--series-2); } .s3 { background: var(--series-3); }
.s4 { background: var(--series-4); } .s5 { background: var(--series-5); } .s6 { background: var(--series-6); }
.s7 { background: var(--series-7); } .s8 { background: var(--series-8); } .s9 { background: var(--series-9); }
.s10 { background: var(--series-10); } .s11 { background: var(--series-11); } .s12 { background: var(--series-12); }
.scroll { overflow-x: auto; margin: 6px -22px -20px; padding: 0 22px 16px; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 7px 8px; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
th { white-space: normal; font-weight: 600; font-size: 12.5px; color: var(--muted); vertical-align: bottom; padding: 0; }
tr.group th { text-align: center; border-bottom: 1px solid var(--line); padding: 4px 8px; }
tr.group td { border: 0; padding: 0; }
th button {
  font: inherit; color: inherit; background: none; border: 0; padding: 7px 8px; width: 100%; text-align: inherit; cursor: pointer;
}
th button:hover { color: var(--ink); }
th[aria-sort] button { color: var(--accent); }
th[aria-sort=ascending] button::after { content: " ↑"; }
th[aria-sort=descending] button::after { content: " ↓"; }
td:first-child, th.text, td.text { text-align: left; }
tr > :first-child { position: sticky; left: 0; background: var(--card); z-index: 1; }
td:first-child { white-space: normal; overflow-wrap: anywhere; }
td:first-child > div { display: flex; width: 216px; }
td:first-child .swatch { margin-top: 7px; }
td:first-child small { white-space: normal; }
tbody tr:hover td { background: var(--hover); }
tbody tr:last-child td { border-bottom: 0; }
td small { display: block; white-space: pre; color: var(--muted); font-size: 12px; line-height: 1.35; }
td .name { font-weight: 550; }
td.wide { white-space: pre-line; min-width: 320px; overflow-wrap: anywhere; }
select {
  font: inherit; font-size: 14px; color: var(--ink); background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 5px 10px; margin: 6px 0 4px; max-width: 100%;
}
button:focus-visible, select:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
pre {
  background: var(--page); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; margin: 10px 0 0;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 480px; overflow-y: auto;
}
.sample { border-top: 1px solid var(--line); padding: 10px 0; display: grid; grid-template-columns: 92px minmax(0, 1fr); gap: 12px; }
.sample .step { color: var(--muted); font-size: 13px; }
.sample .words { white-space: pre-wrap; overflow-wrap: anywhere; }
.sample b { font-weight: 650; }
.turns { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75; margin: 8px 0 0; }
.turns span { padding: 1px 0; color: var(--muted); }
.turns span.trained { color: var(--ink); background: var(--good-soft); box-shadow: inset 0 -2px var(--good); }
.turns span.more { background: var(--warn-soft); box-shadow: inset 0 -2px var(--warn); }
.turns span.less { background: var(--hover); box-shadow: inset 0 -2px var(--accent); }
.turns sub { color: var(--warn); font-size: 10.5px; padding: 0 2px; }
.turns .break { color: var(--muted); opacity: 0.55; }
summary { cursor: pointer; font-weight: 600; }
footer { color: var(--muted); font-size: 12.5px; margin-top: 20px; }
.js-plotly-plot .plotly text { font-variant-numeric: tabular-nums; }
@media (max-width: 640px) {
  main { padding: 14px 12px 32px; }
  section { padding: 16px 14px; border-radius: 10px; }
  .verdict { padding: 14px; }
  .verdict .sentence { font-size: 19px; }
  .scroll { margin: 6px -14px -16px; padding: 0 14px 12px; }
  td:first-child > div { width: 146px; }
  .sample { grid-template-columns: minmax(0, 1fr); gap: 2px; }
}
@media print { section { break-inside: avoid; } .chips, select { display: none; } }
"""
