"use strict";
// The page of winnow label. Each vote waits for the server's word that it is saved before the next is asked.

const QUESTIONS = {
  appeal: "Which image looks better?",
  faithfulness: "Which image shows the text better?",
};
const at = (id) => document.getElementById(id);
let voter = "", task = null, began = 0, busy = false, focused = 0;

async function ask(path, body) {
  if (busy) return false;
  busy = true;
  try {
    const options = body && {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ voter, ...body }),
    };
    const answer = await fetch(path, options || undefined);
    const text = await answer.text();
    if (!answer.ok) throw new Error(reason(text));
    at("problem").hidden = true;
    show(JSON.parse(text));
    return true;
  } catch (error) {
    at("problem").textContent = `Not saved: ${error.message}. Try again; if that fails, is winnow label still running?`;
    at("problem").hidden = false;
    return false;
  } finally {
    busy = false;
  }
}

function reason(text) {
  try {
    const said = JSON.parse(text);
    return said.error || "the server does not take it";
  } catch {
    return text.trim() || "no answer";
  }
}

const open = (index) => ask(`/task?voter=${encodeURIComponent(voter)}${index === undefined ? "" : `&at=${index}`}`);

function show(next) {
  const moved = !task || task.at !== next.at || task.kind !== next.kind;
  task = next;
  began = performance.now();
  at("title").textContent = next.title;
  at("progress").max = next.total;
  at("progress").value = next.done;
  at("count").textContent = `${next.done} of ${next.total}` + (next.kind === "picks" ? `, ${next.kept} kept` : "");
  at("who").textContent = voter;
  at("name").hidden = true;
  at("sheet").hidden = next.kind !== "picks";
  at("pair").hidden = next.kind !== "pairs" || !next.left;
  at("done").hidden = next.kind !== "pairs" || Boolean(next.left);
  if (next.kind === "picks") showSheet(moved);
  else if (next.left) showPair();
}

function picture(image, id) {
  image.onload = () => image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) <= 64);
  const source = `/image/${id}`;
  if (!image.src.endsWith(source)) image.src = source;
}

function showPair() {
  at("question").textContent = QUESTIONS[task.question];
  at("prompt").textContent = task.prompt;
  for (const side of ["left", "right"]) picture(at(side).querySelector("img"), task[side]);
}

function showSheet(moved) {
  if (moved) {
    at("groups").replaceChildren(...task.groups.flatMap(({ prompt, images }) => {
      const head = document.createElement("h2"), tiles = document.createElement("div");
      head.textContent = prompt;
      tiles.className = "tiles";
      tiles.append(...images.map(tile));
      return [head, tiles];
    }));
    focused = 0;
    at("groups").querySelector(".tile").focus();
    scrollTo(0, 0);
  }
  const chosen = new Map(task.groups.flatMap(({ images }) => images.map(({ id, choice }) => [id, choice])));
  for (const one of document.querySelectorAll(".tile")) {
    const choice = chosen.get(one.dataset.id) || "";
    one.dataset.choice = choice;
    one.dataset.said = { keep: "kept", drop: "dropped" }[choice] || "";
    one.setAttribute("aria-label", `Image ${one.dataset.id} ${one.dataset.said}`);
  }
  at("previous").disabled = task.at === 0;
  at("next").disabled = task.at === task.sheets - 1;
}

function tile({ id }) {
  const one = document.createElement("button"), image = document.createElement("img");
  one.className = "tile";
  one.dataset.id = id;
  image.alt = "";
  picture(image, id);
  one.append(image);
  one.addEventListener("focus", () => { focused = tiles().indexOf(one); });
  one.addEventListener("click", () => {
    focused = tiles().indexOf(one);  // not every browser focuses a button that is clicked
    one.focus();
    pick(one.dataset.choice === "keep" ? "drop" : "keep");
  });
  return one;
}

const tiles = () => [...document.querySelectorAll(".tile")];
const seconds = () => (performance.now() - began) / 1000;

function move(step) {
  const all = tiles();
  all[Math.min(Math.max(focused + step, 0), all.length - 1)].focus();
}

const pick = (choice) => ask("/vote", {
  question: "keep", sample: tiles()[focused].dataset.id, choice, seconds: seconds(), at: task.at,
});
const pickAndMove = async (choice) => { if (await pick(choice)) move(1); };

const prefer = (choice) => ask("/vote", {
  question: task.question, sample: task.left, other: task.right, choice, seconds: seconds(),
});
const undo = () => ask("/undo", task.kind === "picks" ? { at: task.at } : {});

function row() {
  const all = tiles(), top = all[focused].offsetTop;
  return Math.max(1, all.filter((one) => one.offsetTop === top).length);
}

const PAIR = { ArrowLeft: () => prefer("left"), 1: () => prefer("left"), ArrowRight: () => prefer("right"),
  2: () => prefer("right"), ArrowDown: () => prefer("skip"), s: () => prefer("skip") };
const SHEET = {
  ArrowLeft: () => move(-1), ArrowRight: () => move(1), ArrowUp: () => move(-row()), ArrowDown: () => move(row()),
  k: () => pickAndMove("keep"), d: () => pickAndMove("drop"),
  n: () => task.at < task.sheets - 1 && open(task.at + 1), p: () => task.at > 0 && open(task.at - 1),
};

addEventListener("keydown", (event) => {
  if (!task || event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "INPUT") return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const act = key === "u" ? undo : task.kind === "picks" ? SHEET[key] : task.left && PAIR[key];
  if (!act) return;
  event.preventDefault();
  if (!event.repeat || key.startsWith("Arrow") && task.kind === "picks") act();
});

const clicks = {
  left: () => prefer("left"), right: () => prefer("right"), skip: () => prefer("skip"), undo, last: undo,
  takeback: undo, next: SHEET.n, previous: SHEET.p, keep: SHEET.k, drop: SHEET.d,
};
for (const [id, act] of Object.entries(clicks)) at(id).addEventListener("click", act);

at("name").addEventListener("submit", (event) => {
  event.preventDefault();
  voter = at("voter").value.trim();
  sessionStorage.setItem("voter", voter);
  open();
});
voter = sessionStorage.getItem("voter") || "";
if (voter) open();
else {
  at("name").hidden = false;
  at("voter").focus();
}
