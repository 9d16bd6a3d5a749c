// Points of a curve are [x, steps, value]; columns of a histogram are [x, steps, [[bin, share], ...]].
function nearest(points, x) {
  let best = null;
  for (const point of points) if (!best || Math.abs(point[0] - x) < Math.abs(best[0] - x)) best = point;
  return best;
}
for (const svg of document.querySelectorAll("svg[data-curves], svg[data-columns]")) {
  const curves = svg.dataset.curves ? JSON.parse(svg.dataset.curves) : [];
  const columns = svg.dataset.columns ? JSON.parse(svg.dataset.columns) : [];
  const cursor = svg.querySelector(".cursor");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const first = nearest(columns.length ? columns : curves.flatMap((curve) => curve[1]), x);
    if (!first) return;
    const rows = [heading(first[1])];
    for (const [name, points] of curves) {
      const point = nearest(points, first[0]);
      rows.push(line(point[1] === first[1] ? name : `${name}, ${point[1]}`, point[2]));
    }
    for (const [bin, share] of columns.length ? first[2] : []) rows.push(line(bin, share));
    cursor.setAttribute("x1", first[0]);
    cursor.setAttribute("x2", first[0]);
    cursor.style.visibility = "visible";
    show(rows, event.clientX, event.clientY);
  });
  svg.addEventListener("pointerleave", () => { cursor.style.visibility = "hidden"; tip.hidden = true; });
}
