"""Style and script of the page of an evaluation."""

STYLE = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;color:#1c2128;background:#fff;max-width:1140px;margin:24px auto;padding:0 20px}
h1{font-size:22px;margin-bottom:0;overflow-wrap:anywhere}h2{font-size:17px;margin:32px 0 6px}
.lead,.hint,.file,dt{color:#57606a}.lead{margin-top:2px}.hint{font-size:13px;margin:4px 0}
.cards{display:flex;flex-wrap:wrap;gap:12px;margin-top:16px}
.card{border:1px solid #d0d7de;border-radius:8px;padding:10px 18px;min-width:150px}
.card .name{color:#57606a}.card .value{font-size:26px;font-weight:600}.card .interval{font-size:13px;color:#57606a}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:14px}
.gallery.wide{grid-template-columns:1fr;gap:22px}
figure{margin:0}figcaption{font-size:13px;margin-top:4px;overflow-wrap:anywhere}
.row{display:flex;gap:8px}.row div{flex:1 1 0;min-width:0}.row span{display:block;font-size:12px;color:#57606a}
.gallery img{width:100%;height:auto;border-radius:4px;display:block}
.gallery:not(.wide) img{height:170px;object-fit:contain;background:#f0f2f4}
.gallery.wide img{max-width:320px}.gallery.wide .row div{flex:0 1 320px}.file{font-size:12px}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:13px;margin:6px 0 12px}
.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;border:1px solid #0002}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th{text-align:left;border-bottom:2px solid #c9d1d9;padding:4px 10px;white-space:nowrap;vertical-align:bottom}
td{padding:3px 10px;border-bottom:1px solid #eaeef2;white-space:nowrap}th[data-sort]{cursor:pointer}
th[data-sort]:hover{background:#f6f8fa}td:first-child,td[data-value],th[data-sort=number]{text-align:right}
.narrow td:first-child{text-align:left}.narrow td:last-child{text-align:right}
td.bar{min-width:110px;background:linear-gradient(#b6d4fe,#b6d4fe) left/calc(var(--share)*100%) 100% no-repeat}
td.interval{color:#57606a}
.matrix td{border:1px solid #eaeef2;text-align:center;min-width:26px;padding:2px 4px}.matrix td.dark{color:#fff}
.matrix td:first-child{text-align:center}.matrix th{border:0;padding:2px 8px}.matrix tbody th{text-align:right}
.matrix .turned{padding:4px 0}
.matrix .turned div{writing-mode:vertical-rl;transform:rotate(180deg);margin:0 auto;max-height:160px;overflow:hidden}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;font-size:13px}dd{margin:0;overflow-wrap:anywhere}
"""

SCRIPT = """
for(const head of document.querySelectorAll('th[data-sort]'))head.addEventListener('click',()=>{
  const table=head.closest('table'),body=table.tBodies[0],column=head.cellIndex;
  const up=head.dataset.up!=='1';head.dataset.up=up?'1':'0';
  const key=row=>{const cell=row.cells[column],text=cell.dataset.value??cell.textContent;
    return head.dataset.sort==='number'?Number(text):text};
  [...body.rows].sort((a,b)=>{const x=key(a),y=key(b);return (x<y?-1:x>y?1:0)*(up?1:-1)})
    .forEach(row=>body.append(row))});
"""
