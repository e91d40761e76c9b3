"""How a report's page looks, by day and by night, on a screen and on paper."""

CSS = """
:root {
  color-scheme: light dark;
  --font: system-ui, -apple-system, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif;
  --ink: #1f2328; --muted: #59636e; --line: #d8dee4; --paper: #ffffff; --panel: #f6f8fa; --heat: #2f81f7;
  --series-0: #0969da; --series-1: #bc4c00; --series-2: #1a7f37; --series-3: #8250df;
  --series-4: #bf3989; --series-5: #9a6700; --series-6: #0a7d8c; --series-7: #6e4a2e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6edf3; --muted: #9da7b3; --line: #343b44; --paper: #0d1117; --panel: #161b22; --heat: #1f6feb;
    --series-0: #58a6ff; --series-1: #f0883e; --series-2: #56d364; --series-3: #bc8cff;
    --series-4: #f778ba; --series-5: #e3b341; --series-6: #39c5cf; --series-7: #c69c7b;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 var(--font); }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
header p { margin: 2px 0; color: var(--muted); }
header p b { color: var(--ink); margin-right: .5em; }
h1 { margin: 0 0 12px; font-size: 32px; line-height: 1.2; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 48px 0 16px; font-size: 20px; }
small { color: var(--muted); font-size: 13px; font-weight: 400; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 12px; margin: 28px 0 0; }
dl div { background: var(--panel); border-radius: 8px; padding: 12px 16px; }
dt { color: var(--muted); font-size: 14px; }
dd { margin: 0; font-size: 22px; font-variant-numeric: tabular-nums; }
.pictures { display: grid; grid-template-columns: 1fr 1fr; gap: 32px 28px; margin-top: 40px; }
figure { margin: 0; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figcaption { font-size: 17px; font-weight: 600; margin-bottom: 6px; }
figure svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
.scroll + .scroll { margin-top: 28px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
th, td { padding: 7px 11px; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { padding-left: 0; }
thead th { vertical-align: bottom; font-weight: 600; }
.numbers thead th { min-width: 5.6em; }
thead tr:not(:last-child) > * { border-bottom: 0; padding-bottom: 0; }
.numbers th[colspan] { text-align: right; }
thead th small { display: block; }
tbody th { font-weight: 400; overflow-wrap: anywhere; min-width: 12em; }
.numbers th + th, .numbers td { text-align: right; }
.numbers td { white-space: nowrap; }
.numbers th:first-child { position: sticky; left: 0; background: var(--paper); min-width: 9em; max-width: 18em; }
details { margin-top: 24px; }
details td { overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; padding: 4px 0; }
section p, section li { color: var(--muted); font-size: 15px; }
ul { margin: 0; padding-left: 20px; }
footer { margin-top: 56px; color: var(--muted); font-size: 14px; }
:focus-visible { outline: 2px solid var(--series-0); outline-offset: 3px; }
@media (max-width: 760px) {
  main { padding: 24px 16px 48px; }
  .pictures { grid-template-columns: 1fr; }
  figure.wide div { overflow-x: auto; }
  figure.wide svg { min-width: 640px; }
}
@media print {
  main { max-width: none; padding: 0; }
  figure, tr, dl div { break-inside: avoid; }
}
"""
