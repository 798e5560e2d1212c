"use strict";
// What moves: words beside the pointer, and the layers of whichever point of the front is picked.
(() => {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);

  const say = (text, x, y) => {
    tip.textContent = text;
    tip.hidden = false;
    tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${y + tip.offsetHeight + 24 > innerHeight ? y - tip.offsetHeight - 12 : y + 16}px`;
  };
  addEventListener("beforeprint", () => {
    for (const one of document.querySelectorAll("#reproduce details")) one.open = true;
  });
  const hush = () => { tip.hidden = true; };
  const inside = (svg, event) => new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());

  for (const title of document.querySelectorAll("svg.chart title")) { // what a browser tells without this script
    title.parentElement.dataset.told = title.textContent;
    title.remove();
  }
  for (const chart of document.querySelectorAll("svg.chart")) {
    chart.addEventListener("pointerleave", hush);
    if (chart.id === "front") continue;
    const grid = chart.querySelector("[data-cells]");
    const table = grid && document.getElementById(grid.dataset.cells);
    chart.addEventListener("pointermove", (event) => {
      const told = event.target.closest("[data-told]");
      if (told) return say(told.dataset.told, event.clientX, event.clientY);
      if (!table) return hush();
      const at = inside(chart, event);
      const layer = Math.floor((at.x - grid.dataset.left) / grid.dataset.wide);
      const row = Math.floor((at.y - grid.dataset.top) / grid.dataset.high);
      const line = table.tBodies[0].rows[row];
      const cell = layer >= 0 && line && line.cells[layer + 1];
      if (!cell) return hush();
      const taken = cell.className ? ", chosen" : "";
      say(`layer ${layer}, ${line.cells[0].textContent}: ${cell.textContent || "not on offer"}${taken}`, event.clientX, event.clientY);
    });
  }

  const front = document.getElementById("front");
  const data = JSON.parse(document.getElementById("data").textContent);
  if (!front || !data) return;
  const dots = [...front.querySelectorAll("[data-point]")];
  const panel = document.querySelector(".selected");
  const back = panel.querySelector("button");
  const sites = [...document.querySelectorAll("#strip [data-site]")];
  const names = new Map([...document.querySelectorAll("#strip [data-name]")].map((one) => [one.dataset.name, one]));

  const draw = (blocks) => {
    for (const group of sites) {
      const site = Number(group.dataset.site);
      const [name, told, wide, high] = data.blocks[blocks[site]];
      const bar = group.lastElementChild;
      bar.setAttribute("height", high);
      bar.setAttribute("width", wide);
      bar.setAttribute("y", (site % 2 ? data.strip.bottom : data.strip.top - high).toFixed(1));
      group.dataset.told = `layer ${site >> 1}, ${site % 2 ? "FFN" : "attention"}: ${told}`;
      const label = names.get(group.dataset.site);
      if (label) label.textContent = name;
    }
  };

  const pick = (place, focus) => {
    dots.forEach((dot, index) => {
      dot.setAttribute("aria-checked", String(index === place));
      dot.setAttribute("tabindex", index === place ? "0" : "-1");
    });
    if (focus) dots[place].focus();
    const point = data.points[place];
    draw(point.blocks);
    panel.querySelector("output").textContent = point.said;
    const values = panel.querySelectorAll("dd");
    point.totals.forEach((text, index) => { values[index].textContent = text; });
    panel.querySelector("code").textContent = point.get;
    back.disabled = place === data.chosen || data.chosen === null;
  };

  const nearest = (event) => {
    let best = -1, least = 28 ** 2;
    dots.forEach((dot, index) => {
      const box = dot.getBoundingClientRect();
      const away = (box.x + box.width / 2 - event.clientX) ** 2 + (box.y + box.height / 2 - event.clientY) ** 2;
      if (away < least) [best, least] = [index, away];
    });
    return best;
  };
  let near = -1;
  front.addEventListener("pointermove", (event) => {
    dots[near]?.classList.remove("near");
    near = nearest(event);
    front.style.cursor = near < 0 ? "" : "pointer";
    if (near < 0) return hush();
    dots[near].classList.add("near");
    say(data.points[near].said, event.clientX, event.clientY);
  });
  front.addEventListener("pointerleave", () => dots[near]?.classList.remove("near"));
  front.addEventListener("click", (event) => {
    const place = nearest(event);
    if (place >= 0) pick(place, true);
  });
  front.addEventListener("keydown", (event) => {
    const place = dots.indexOf(document.activeElement);
    const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1 }[event.key];
    const to = step ? place + step : { Home: 0, End: dots.length - 1 }[event.key];
    if (place < 0 || to === undefined) return;
    event.preventDefault();
    pick((to + dots.length) % dots.length, true);
  });
  back.addEventListener("click", () => pick(data.chosen, true));
})();
