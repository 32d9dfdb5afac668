"""The report's style sheet: light and dark, no fonts from anywhere."""

from typing import Final

_LIGHT: Final = (
    "#2563a8",
    "#d9822b",
    "#3f8f5b",
    "#a8457a",
    "#6b5bb5",
    "#8a6d3b",
    "#1e8f95",
    "#b8423a",
)
_DARK: Final = (
    "#6ea8e6",
    "#f0a35a",
    "#73c48f",
    "#dc85b2",
    "#a89bea",
    "#c9a76a",
    "#5cc7cc",
    "#ef8179",
)


def _series(colours: tuple[str, ...]) -> str:
    return "".join(
        f".c{n}{{fill:{c}}}.l{n}{{stroke:{c}}}.t{n}{{fill:{c}}}" for n, c in enumerate(colours)
    )


STYLE: Final = (
    ":root{--ink:#1c2530;--soft:#5c6875;--line:#dfe4ea;--page:#f5f7f9;--card:#fff;--good:#1c7c47;"
    "--bad:#b3261e;--billed:#2563a8;--duplicate:#9db4cc;--quarantined:#d9822b;--voided:#8a6d3b}"
    "*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);"
    "font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans',sans-serif}"
    "main{max-width:1060px;margin:0 auto;padding:32px 20px 64px}"
    "header h1{margin:0;font-size:30px;letter-spacing:-.02em}header p{margin:4px 0 20px;"
    "color:var(--soft)}"
    ".good{color:var(--good);font-weight:600}.bad{color:var(--bad);font-weight:600}"
    ".tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}"
    ".tiles div,section{background:var(--card);border:1px solid var(--line);border-radius:10px}"
    ".tiles div{padding:12px 14px;display:flex;flex-direction:column}"
    ".tiles b{font-size:22px;letter-spacing:-.02em;font-variant-numeric:tabular-nums}"
    "small{color:var(--soft)}section{margin-top:16px;padding:18px 20px}"
    "h2{margin:0;font-size:17px}section>p{margin:2px 0 12px;color:var(--soft);font-size:13.5px}"
    "svg{display:block;width:100%;height:auto;overflow:visible}"
    ".legend svg{display:inline-block;width:11px;height:11px}"
    ".legend span{margin-right:16px;white-space:nowrap}"
    "svg text{font-size:12px;fill:var(--soft)}.end{text-anchor:end}.mid{text-anchor:middle}"
    ".grid{stroke:var(--line)}polyline{fill:none;stroke-width:2;stroke-linejoin:round}"
    ".billed{fill:var(--billed)}.duplicate{fill:var(--duplicate)}"
    ".quarantined{fill:var(--quarantined)}"
    ".voided{fill:var(--voided)}.wide{overflow-x:auto;margin-top:10px}"
    "table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:13.5px}"
    "th{text-align:right;color:var(--soft);font-weight:500;"
    "border-bottom:1px solid var(--line);padding:5px 8px}"
    "td{text-align:right;border-bottom:1px solid var(--line);padding:5px 8px;white-space:nowrap}"
    "tr:last-child td{border-bottom:0}"
    "th.name,td.name{text-align:left}a{color:var(--billed)}code{font-size:12px}"
    "summary{cursor:pointer;color:var(--soft);margin-top:10px}"
    + _series(_LIGHT)
    + "svg text[class^=t]{font-weight:600}"
    + "".join(f"svg text.t{n}{{fill:{c}}}" for n, c in enumerate(_LIGHT))
    + "@media(prefers-color-scheme:dark){:root{--ink:#e6ebf0;--soft:#9aa7b4;--line:#2c3641;"
    "--page:#11161c;"
    "--card:#181f27;--good:#6fce97;--bad:#ff8a80;--billed:#6ea8e6;--duplicate:#46607c;"
    "--quarantined:#f0a35a}"
    + _series(_DARK)
    + "".join(f"svg text.t{n}{{fill:{c}}}" for n, c in enumerate(_DARK))
    + "}"
)
