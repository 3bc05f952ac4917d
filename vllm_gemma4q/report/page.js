"use strict";
// What the page gains from scripts: one tab stop for the grid with arrow keys in it, tooltips beside their cells, and
// buttons that copy commands. All of the content is there without them.
document.documentElement.classList.add("js");

const GAP = 8;

function place(cell) {
  const tip = cell.querySelector(".tip");
  if (!tip || window.innerWidth < 640) return;
  const box = cell.getBoundingClientRect();
  const size = tip.getBoundingClientRect();
  // Right of a narrow grid it covers no cell.
  const edge = (cell.closest(".grid")?.getBoundingClientRect().right ?? Infinity) + GAP;
  const beside = edge + size.width + GAP <= window.innerWidth;
  const left = beside ? edge : Math.min(Math.max(GAP, box.left + box.width / 2 - size.width / 2), window.innerWidth - size.width - GAP);
  const below = box.bottom + GAP;
  const fits = below + size.height <= window.innerHeight || box.top < size.height + GAP;
  tip.style.left = `${left}px`;
  tip.style.right = "auto";
  tip.style.bottom = "auto";
  const above = box.top - size.height - GAP;
  const level = Math.min(box.top, window.innerHeight - size.height - GAP);
  tip.style.top = `${Math.max(GAP, beside ? level : fits ? below : above)}px`;
}

// A pointer and the keyboard never show two tooltips at once; Escape hides the one that is shown.
let shown = null;
function show(cell) {
  if (shown) shown.classList.remove("shown");
  shown = cell;
  if (!cell) return;
  cell.classList.add("shown");
  place(cell);
}

for (const cell of document.querySelectorAll(".cell")) {
  cell.addEventListener("pointerenter", () => show(cell));
  cell.addEventListener("pointerleave", () => show(document.activeElement.closest?.(".cell") ?? null));
  cell.addEventListener("focus", () => show(cell));
  cell.addEventListener("blur", () => show(null));
}
for (const area of [window, document.querySelector(".grid").parentElement]) {
  area.addEventListener("scroll", () => shown && place(shown), { passive: true });
}

const grid = document.querySelector(".grid");
const rows = [...grid.tBodies[0].rows].map((row) => [...row.cells].slice(1));
let current = null;
function enter(cell) {
  if (current) current.tabIndex = -1;
  current = cell;
  cell.tabIndex = 0;
}
for (const cell of grid.querySelectorAll(".cell")) cell.tabIndex = -1;
if (grid.querySelector(".cell")) enter(grid.querySelector(".cell"));
grid.addEventListener("focusin", (event) => event.target.matches(".cell") && enter(event.target));

const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
grid.addEventListener("keydown", (event) => {
  const y = rows.findIndex((row) => row.includes(event.target));
  if (y < 0) return;
  let x = rows[y].indexOf(event.target);
  let target = null;
  if (event.key === "Home") target = rows[y].find((cell) => cell.matches(".cell"));
  if (event.key === "End") target = rows[y].findLast((cell) => cell.matches(".cell"));
  const move = MOVES[event.key];
  for (let row = y; move && !target; ) {
    row += move[0];
    x += move[1];
    if (!rows[row]?.[x]) break;
    if (rows[row][x].matches(".cell")) target = rows[row][x];
  }
  if (!target) return;
  event.preventDefault();
  target.focus();
});
document.addEventListener("keydown", (event) => event.key === "Escape" && show(null));

async function copy(text, source) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Pages from a disk may not reach the clipboard: selected text can be copied by hand.
    const range = document.createRange();
    range.selectNodeContents(source);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    return document.execCommand("copy");
  }
}
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", async () => {
    const source = button.previousElementSibling;
    button.textContent = (await copy(source.textContent, source)) ? "copied" : "selected";
    setTimeout(() => (button.textContent = "copy"), 1500);
  });
}
