for (const button of document.querySelectorAll('th button')) button.addEventListener('click', () => {
  const th = button.parentElement, table = th.closest('table'), body = table.tBodies[0];
  const up = th.getAttribute('aria-sort') !== 'ascending', column = th.cellIndex;
  for (const other of table.querySelectorAll('th[aria-sort]')) other.removeAttribute('aria-sort');
  th.setAttribute('aria-sort', up ? 'ascending' : 'descending');
  const key = row => { const c = row.cells[column]; return c.dataset.value ? +c.dataset.value : c.textContent.trim(); };
  const order = (a, b) => {
    const x = key(a), y = key(b);
    if (x === '' || y === '') return (x === '') - (y === '');
    const d = typeof x === 'number' && typeof y === 'number' ? x - y : String(x).localeCompare(String(y));
    return up ? d : -d;
  };
  body.append(...[...body.rows].sort(order));
});
const charts = JSON.parse(document.getElementById('charts').textContent);
const scheme = window.matchMedia('(prefers-color-scheme: dark)');
const theme = () => {
  const style = getComputedStyle(document.documentElement), [ink, soft, line] =
    ['--ink', '--soft', '--line'].map(name => style.getPropertyValue(name).trim());
  return {
    background: 'transparent', font: 'system-ui, sans-serif', view: {stroke: null}, padding: 4,
    title: {color: ink, fontSize: 13, fontWeight: 600, anchor: 'start', frame: 'group', limit: 330},
    axis: {labelColor: soft, titleColor: ink, gridColor: line, domainColor: soft, tickColor: soft,
      titleFontWeight: 500, labelFontSize: 11, titleFontSize: 12, labelLimit: 120},
    legend: {labelColor: ink, titleColor: ink, orient: 'bottom'}, text: {color: ink},
  };
};
const draw = panel => vegaEmbed(panel, charts[panel.dataset.chart][+panel.dataset.panel],
  {actions: false, renderer: 'svg', ast: true, config: theme(), tooltip: {theme: scheme.matches ? 'dark' : 'light'}});
// A panel is drawn when it comes near the screen: many of them take seconds, and behind closed details have no width.
const watch = new IntersectionObserver(seen => {
  for (const {target, isIntersecting} of seen) if (isIntersecting) { watch.unobserve(target); draw(target); }
}, {rootMargin: '600px'});
const panels = document.querySelectorAll('.panel');
if (panels.length) document.documentElement.classList.add('live');
for (const panel of panels) watch.observe(panel);
scheme.addEventListener('change', () => panels.forEach(panel => panel.firstChild && draw(panel)));
