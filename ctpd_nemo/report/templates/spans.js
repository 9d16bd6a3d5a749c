function rowsOf(band) {
  const { number, bytes, kind, cut, scores } = band.dataset;
  const rows = [heading(kind === "end" ? "end of turn" : `span ${number} · bytes ${bytes} · ${kind}`)];
  if (cut) rows.push(line("cut character", cut));
  const sides = band.querySelectorAll(".side");
  for (const [side, name] of [[sides[0], "teacher"], [sides[1], "student"]]) {
    for (const token of side.children) rows.push(line(`${name} ${token.dataset.id}`, token.textContent));
  }
  for (const score of scores ? scores.split("|") : []) rows.push(line(...score.split("=")));
  return rows;
}
let chosen = null;
function choose(band, x, y) {
  if (chosen) chosen.classList.remove("on");
  chosen = band;
  if (!band) { tip.hidden = true; return; }
  band.classList.add("on");
  show(rowsOf(band), x, y);
}
document.addEventListener("pointerover", (event) => {
  choose(event.target.closest(".band"), event.clientX, event.clientY);
});
document.addEventListener("keydown", (event) => {
  const flow = event.target.closest && event.target.closest(".flow");
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!flow || !step) return;
  const bands = [...flow.querySelectorAll(".band")];
  const next = bands[(bands.indexOf(chosen) + step + bands.length) % bands.length];
  if (!next) return;
  event.preventDefault();
  next.scrollIntoView({ block: "nearest" });
  const box = next.getBoundingClientRect();
  choose(next, box.left, box.bottom);
});
