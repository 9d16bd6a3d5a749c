// One panel for all numbers of the page. Texts reach it as text, never as HTML.
const tip = document.getElementById("tip");
function line(name, value) {
  const row = document.createElement("div");
  for (const text of [name, value]) {
    const cell = document.createElement("span");
    cell.textContent = text;
    row.append(cell);
  }
  return row;
}
function heading(text) {
  const row = document.createElement("b");
  row.textContent = text;
  return row;
}
function show(rows, x, y) {
  tip.replaceChildren(...rows);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = Math.min(x + 14, innerWidth - box.width - 6);
  const top = y + 18 + box.height > innerHeight ? y - box.height - 12 : y + 18;
  tip.style.left = Math.max(4, left) + "px";
  tip.style.top = Math.max(4, top) + "px";
}
addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
