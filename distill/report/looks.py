"""Style and script of the page. The script shows the values of the curves under the mouse; the page reads without it."""

STYLE = """
:root { color-scheme: light; --line: #d9dde3; --dim: #5b6370; --ink: #171b21 }
* { box-sizing: border-box }
body { margin: 0; background: #fff; color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 24px }
h1 { font-size: 26px; margin: 0 0 8px; overflow-wrap: anywhere }
h1 small { display: block; color: var(--dim); font-size: 13px; font-weight: normal }
h2 { font-size: 19px; margin: 32px 0 8px; padding-bottom: 4px; border-bottom: 2px solid var(--line) }
h3 { font-size: 15px; margin: 16px 0 6px; overflow-wrap: anywhere }
.conclusion { font-size: 17px; margin: 8px 0 2px; overflow-wrap: anywhere }
.note { color: var(--dim); font-size: 13px; margin: 4px 0; overflow-wrap: anywhere }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums }
th, td { padding: 4px 12px; border-bottom: 1px solid var(--line); vertical-align: top; text-align: right }
th:first-child { text-align: left; padding-left: 0 }
thead th { color: var(--dim); font-size: 12.5px; font-weight: 600; vertical-align: bottom }
tbody th { font-weight: 600; overflow-wrap: anywhere }
.texts td, .texts th { text-align: left; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); gap: 8px 20px }
.chart { width: 100%; max-width: 760px; height: auto; display: block; font-size: 11px }
.chart text { fill: var(--dim) }
.chart .title { fill: var(--ink); font-size: 12.5px; font-weight: 600 }
.chart .grid { stroke: var(--line); stroke-width: 1 }
.chart .idle { fill: #f0f2f5 }
.chart polyline { stroke-width: 1.8; stroke-linejoin: round }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 4px 0 8px; font-size: 13px }
.legend svg { margin-right: 6px; vertical-align: -1px }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 6px 0; font-size: 14px }
dt { color: var(--dim) }
dd { margin: 0; overflow-wrap: anywhere }
pre { background: #f6f7f9; padding: 12px; overflow-x: auto; font-size: 12.5px; line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere }
code { font-size: 13px }
img { max-width: 100%; height: auto; display: block }
.hover { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 10px; margin: 14px 0 }
.hover[hidden] { display: none }
.hover figure { margin: 0; font-size: 12.5px; overflow-wrap: anywhere }
.hover img, .hover canvas { width: 100%; display: block; image-rendering: pixelated; cursor: crosshair }
#tip { position: fixed; display: none; pointer-events: none; background: #171b21; color: #fff; padding: 5px 9px; border-radius: 4px; font-size: 12px; white-space: pre; z-index: 9 }
@page { size: A4; margin: 14mm }
@media print {
  main { padding: 0; max-width: none }
  body { font-size: 10.5pt }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact }
  h2, h3 { break-after: avoid }
  .chart, tr, img, .legend { break-inside: avoid }
  .charts { grid-template-columns: 1fr 1fr }
  .wide { overflow: visible }
  table { font-size: 9pt }
  th, td { padding: 3px 6px }
  #tip { display: none !important }
}
"""

SCRIPT = """
(function () {
  'use strict';
  var tip = document.getElementById('tip');
  function numbers(text) { return text.split(' ').map(Number); }
  function back(axis, pixel) {
    var low = axis[0], high = axis[1];
    if (axis[4]) { low = Math.log10(low); high = Math.log10(high); }
    var value = low + (pixel - axis[2]) / (axis[3] - axis[2]) * (high - low);
    return axis[4] ? Math.pow(10, value) : value;
  }
  function digits(value) { return String(Number(value.toPrecision(4))); }
  function show(event) {
    var chart = event.target.closest && event.target.closest('svg[data-x]');
    if (!chart) { tip.style.display = 'none'; return; }
    var box = chart.getBoundingClientRect(), view = chart.viewBox.baseVal;
    var x = (event.clientX - box.left) / box.width * view.width;
    var across = numbers(chart.dataset.x), up = numbers(chart.dataset.y), lines = [], step = null;
    chart.querySelectorAll('polyline').forEach(function (curve) {
      var best = null, points = curve.points;
      for (var i = 0; i < points.length; i++) {
        if (best === null || Math.abs(points[i].x - x) < Math.abs(best.x - x)) { best = points[i]; }
      }
      if (best === null || Math.abs(best.x - x) > 40) { return; }
      if (step === null) { step = Math.round(back(across, best.x)); }
      lines.push(curve.dataset.name + '  ' + digits(back(up, best.y)));
    });
    if (!lines.length) { tip.style.display = 'none'; return; }
    tip.textContent = 'step ' + step + '\\n' + lines.join('\\n');
    tip.style.display = 'block';
    tip.style.left = Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8) + 'px';
    tip.style.top = (event.clientY + 14) + 'px';
  }
  document.addEventListener('mousemove', show);
  document.querySelectorAll('.hover').forEach(function (band) {
    var palette = band.dataset.palette.match(/../g).map(function (hex) { return parseInt(hex, 16); });
    var stops = palette.length / 3, maps = [];
    band.querySelectorAll('canvas').forEach(function (canvas) {
      var text = atob(canvas.dataset.features), bytes = new Uint8Array(text.length);
      for (var i = 0; i < text.length; i++) { bytes[i] = text.charCodeAt(i); }
      maps.push({canvas: canvas, rows: new Int8Array(bytes.buffer)});
    });
    function compare(x, y) {
      maps.forEach(function (map) {
        var width = map.canvas.width, height = map.canvas.height, rows = map.rows;
        var size = rows.length / (width * height), found = [], low = 1, i, k;
        var at = (Math.min(height - 1, Math.floor(y * height)) * width + Math.min(width - 1, Math.floor(x * width))) * size;
        for (i = 0; i < rows.length; i += size) {
          var dot = 0, mine = 0, other = 0;
          for (k = 0; k < size; k++) {
            dot += rows[i + k] * rows[at + k]; mine += rows[i + k] * rows[i + k]; other += rows[at + k] * rows[at + k];
          }
          found.push(dot / (Math.sqrt(mine * other) || 1));
          low = Math.min(low, found[found.length - 1]);
        }
        var pen = map.canvas.getContext('2d'), image = pen.createImageData(width, height);
        found.forEach(function (cosine, index) {
          var stop = Math.round(Math.max(0, Math.min(1, (cosine - low) / ((1 - low) || 1))) * (stops - 1));
          for (k = 0; k < 3; k++) { image.data[4 * index + k] = palette[3 * stop + k]; }
          image.data[4 * index + 3] = 255;
        });
        pen.putImageData(image, 0, 0);
        map.canvas.title = 'cosine ' + low.toFixed(2) + ' to 1';
      });
    }
    band.hidden = false;
    compare(0.5, 0.5);
    band.addEventListener('mousemove', function (event) {
      var part = event.target.closest('img, canvas');
      if (!part) { return; }
      var box = part.getBoundingClientRect();
      compare((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    });
  });
})();
"""

LIVE_SCRIPT = """
(function () {
  'use strict';
  var main = document.querySelector('main'), busy = false, again = false;
  function renew() {
    if (busy) { again = true; return; }
    busy = true;
    fetch('body').then(function (answer) {
      if (!answer.ok) { throw new Error('no answer'); }
      return answer.text();
    }).then(function (text) {
      main.innerHTML = text;  // escaped by the server, and no script may run but this one
    }).catch(function () {}).then(function () {
      busy = false;
      if (again) { again = false; setTimeout(renew, 1000); }
    });
  }
  new EventSource('events').onmessage = renew;
})();
"""
