"""Style, script and images of the HTML report."""

from __future__ import annotations

import base64
import io

import numpy as np

STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;color:#1c2128;background:#fff;max-width:1140px;margin:24px auto;padding:0 20px}
h1{font-size:22px}h2{font-size:17px;margin:28px 0 4px}
.verdict{padding:12px 16px;border-radius:8px;border:1px solid;font-size:16px}
.verdict.good{background:#e8f5ec;border-color:#2da44e}.verdict.bad{background:#ffeceb;border-color:#d1242f}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px}dt{color:#57606a}dd{margin:0}
.plot{width:100%;height:auto}.grid{stroke:#e4e8ec}.block{stroke:#c9d1d9;stroke-dasharray:2 3}
.floor{stroke:#57606a;stroke-dasharray:1 4;stroke-width:1.5}.tick{font-size:11px;fill:#57606a}
.legend span{margin-right:20px}.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
.scroll>table{width:100%}th{text-align:left;border-bottom:2px solid #c9d1d9;padding:4px 8px;white-space:nowrap}
td{padding:3px 8px;border-bottom:1px solid #eaeef2;white-space:nowrap}tbody tr[data-name]{cursor:pointer}
tbody tr[data-name]:hover{background:#f6f8fa}tr.hard{background:#ffeceb}
tr.hard td:last-child{color:#b0171f;font-weight:600}
tr.soft td:last-child{color:#9a6700}tr.ok td:last-child{color:#1a7f37}
tr.more td{white-space:normal;background:#f9fafb}.details{display:flex;flex-wrap:wrap;gap:28px;align-items:flex-start}
.details p{margin:4px 0;color:#57606a}.numbers td{border:0;padding:1px 10px 1px 0}
.bars{width:400px}.bars rect{fill:#1f6feb}.details img{image-rendering:pixelated;border:1px solid #c9d1d9}
input[type=search]{padding:3px 8px;margin:0 12px}.foot{color:#57606a}
"""

SCRIPT = """
const rows=[...document.querySelectorAll('tr[data-name]')];
const bad=document.getElementById('bad-only'),find=document.getElementById('find');
function toggle(row){const more=row.nextElementSibling;more.hidden=!more.hidden}
function filter(){for(const row of rows){
  const hide=(bad.checked&&row.classList.contains('ok'))||!row.dataset.name.includes(find.value.trim());
  row.hidden=hide;if(hide)row.nextElementSibling.hidden=true}}
for(const row of rows){row.addEventListener('click',()=>toggle(row));
  row.addEventListener('keydown',e=>{if(e.key==='Enter')toggle(row)})}
bad.addEventListener('change',filter);find.addEventListener('input',filter);
const first=document.querySelector('tr.hard');if(first)toggle(first);
"""

# White over yellow and red to black, at evenly spaced heights.
COLOURS = np.array([(255, 255, 255), (254, 224, 139), (244, 109, 67), (165, 0, 38), (20, 0, 10)], np.float64)


def heat_png(heat: np.ndarray) -> str:
    """A map of differences as an image in base64; elements that are not finite are blue."""
    from PIL import Image

    known = np.isfinite(heat)
    peak = heat[known].max() if known.any() else 0.0
    level = np.where(known, heat, 0) / (peak or 1.0) * (len(COLOURS) - 1)
    low = np.minimum(level.astype(int), len(COLOURS) - 2)
    share = (level - low)[..., None]
    pixels = COLOURS[low] * (1 - share) + COLOURS[low + 1] * share
    pixels[~known] = (30, 60, 255)
    file = io.BytesIO()
    Image.fromarray(pixels.round().astype(np.uint8)).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()
