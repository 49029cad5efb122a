"""How the page looks, by day and by night, on a screen and on paper."""

from __future__ import annotations

CSS = """
:root{color-scheme:light dark;--page:#f4f5f7;--card:#fff;--ink:#1b2430;--soft:#5c6877;--line:#e1e5ea;
--local:#2f6fde;--backup:#e08a1e;--failed:#c8324a;--gap:#c8324a24;--good:#187a4b;--bad:#b3263e;--warn:#a85f00;
--goodback:linear-gradient(135deg,#12704a,#1d9a63);--badback:linear-gradient(135deg,#8f1d33,#c23a4e)}
@media(prefers-color-scheme:dark){:root{--page:#11161d;--card:#1a212b;--ink:#e6ebf1;--soft:#97a4b3;--line:#2b3542;
--local:#5b95f5;--backup:#f0a848;--failed:#ef6479;--gap:#ef647930;--good:#4cc98b;--bad:#f0788b;--warn:#f0b055;
--goodback:linear-gradient(135deg,#0e4f36,#15704a);--badback:linear-gradient(135deg,#661626,#8f2a3c)}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 20px 40px}
header{color:#fff;border-radius:14px;padding:26px 30px 24px;margin-bottom:18px}
header.good{background:var(--goodback)}
header.bad{background:var(--badback)}
header p{margin:6px 0 0;max-width:760px}
header ul{margin:6px 0 0;padding-left:22px}
header pre{background:#0003;color:inherit}
.kicker{font-size:14px;opacity:.85;margin:0}
h1{font-size:34px;line-height:1.2;margin:6px 0 2px;letter-spacing:-.01em}
h2{font-size:18px;margin:0 0 10px}
.figures{display:grid;grid-template-columns:repeat(3,1fr);gap:14px;margin-bottom:14px}
@media(max-width:760px){.figures{grid-template-columns:1fr 1fr}}
@media(max-width:480px){.figures{grid-template-columns:1fr}}
.figure,.panel{background:var(--card);border:1px solid var(--line);border-radius:12px}
.figure{padding:16px 20px 14px}
.value{font-size:32px;font-weight:650;line-height:1.15;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.figure.warn .value{color:var(--warn)}
.figure.bad .value{color:var(--bad)}
.label{font-weight:600;margin-top:2px}
.figure p{margin:4px 0 0;font-size:14px;color:var(--soft)}
.panel{padding:20px 24px;margin-bottom:14px;overflow-x:auto}
.legend{display:flex;flex-wrap:wrap;gap:6px 20px;margin:0 0 6px;font-size:14px;color:var(--soft)}
.key{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:7px;vertical-align:-1px}
i.local{background:var(--local)}i.backup{background:var(--backup)}i.failed{background:var(--failed)}
i.gap{background:var(--gap);border:1px solid var(--failed)}
svg{display:block;width:100%;min-width:640px;height:auto}
svg text{fill:var(--soft);font-size:11.5px;font-family:inherit}
rect.local{fill:var(--local)}rect.backup{fill:var(--backup)}rect.failed{fill:var(--failed)}rect.gap{fill:var(--gap)}
.grid{stroke:var(--line)}
.mark{stroke:var(--ink);stroke-width:1;stroke-dasharray:3 3;fill:none;opacity:.55}
circle.flag{fill:var(--ink)}
svg text.flag{fill:var(--card);font-weight:700;font-size:11px}
.events{margin:10px 0 0;padding-left:24px;columns:2;column-gap:36px;font-size:14.5px}
.events li{break-inside:avoid;padding:1px 0}
.events b{font-variant-numeric:tabular-nums;font-weight:600;margin-right:4px}
@media(max-width:760px){.events{columns:1}}
table{border-collapse:collapse;width:100%}
td,th{padding:6px 10px 6px 0;text-align:left;vertical-align:baseline;border-top:1px solid var(--line)}
tr:first-child>*{border-top:0}
th{font-size:13px;font-weight:600;color:var(--soft)}
.sign{width:26px;font-weight:700}.yes{color:var(--good)}.no{color:var(--bad)}
.detail,.clock{color:var(--soft);font-size:14.5px}
.number{text-align:right;font-variant-numeric:tabular-nums}
.wide{width:30%;padding-left:12px}
.wide i{display:block;height:8px;border-radius:4px;background:var(--local);opacity:.75;min-width:2px}
dl{display:grid;grid-template-columns:130px 1fr;gap:6px 16px;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:480px){dl{grid-template-columns:1fr}}
code,pre{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--page);
border-radius:8px;padding:12px 14px;margin:8px 0 0}
details{margin-top:12px}summary{cursor:pointer;font-weight:600}
footer{color:var(--soft);font-size:13.5px;padding:8px 4px}
@media print{body{background:#fff}.panel,.figure{break-inside:avoid}}
"""
