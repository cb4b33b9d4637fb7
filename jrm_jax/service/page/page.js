"use strict";
// One script, no library. Everything that a person typed or a server said is set as text.

const MOST = 8;
const SIDE = 256; // pixels of a picture on the sheet
// {file, url}; addresses stay until the page is closed: a ranking may still show the picture
const chosen = { source: [], candidates: [] };
let ranked = null; // {instruction, source, rows: [{picture, answer, text}]}, best first

const at = (id) => document.getElementById(id);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function complain(where, words) {
  at(`${where}-error`).textContent = words;
  const field = at(where === "form" || where === "result" ? "rank" : where);
  field.toggleAttribute("aria-invalid", Boolean(words));
}

function quiet() {
  for (const where of ["instruction", "source", "candidates", "form", "result"]) complain(where, "");
}

// Choosing pictures

function choose(kind, files) {
  complain(kind, "");
  const most = kind === "source" ? 1 : MOST;
  const pictures = [...files].filter((file) => /^image\/(png|jpeg|webp)$/.test(file.type));
  if (pictures.length < files.length) {
    complain(kind, "PNG, JPEG and WebP files are taken; others were left out.");
  }
  const added = pictures.map((file) => ({ file, url: URL.createObjectURL(file) }));
  const all = kind === "source" ? added.slice(-1) : [...chosen[kind], ...added];
  if (all.length > most) complain(kind, `At most ${most}: the first ${most} are kept.`);
  if (all.length || kind === "candidates") chosen[kind] = all.slice(0, most);
  show(kind);
}

function show(kind) {
  at(`${kind}-list`).replaceChildren(
    ...chosen[kind].map((one, index) =>
      make(
        "li",
        {},
        make("img", { src: one.url, alt: one.file.name }),
        make(
          "div",
          { class: "name" },
          make("span", { title: one.file.name }, one.file.name),
          make(
            "button",
            {
              type: "button",
              class: "remove",
              "aria-label": `Remove ${one.file.name}`,
              onclick: () => {
                chosen[kind].splice(index, 1);
                show(kind);
                at(kind).focus();
              },
            },
            "×",
          ),
        ),
      ),
    ),
  );
}

for (const kind of ["source", "candidates"]) {
  const input = at(kind);
  const drop = at(`${kind}-drop`);
  input.addEventListener("change", () => {
    choose(kind, input.files);
    input.value = "";
  });
  drop.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    choose(kind, event.dataTransfer.files);
  });
}
// a picture that misses its place would replace the page
for (const name of ["dragover", "drop"]) {
  window.addEventListener(name, (event) => event.preventDefault());
}

at("clear").addEventListener("click", () => {
  quiet();
  at("instruction").value = "";
  for (const kind of ["source", "candidates"]) {
    chosen[kind] = [];
    show(kind);
  }
  at("result").hidden = true;
  at("instruction").focus();
});

at("example").addEventListener("click", async () => {
  quiet();
  try {
    const answer = await fetch("/page/example.json");
    if (!answer.ok) throw new Error(await wordsOf(answer));
    const found = await answer.json();
    at("instruction").value = found.instruction;
    chosen.candidates = [];
    choose("source", [await fileOf(found.source, "source.png")]);
    choose(
      "candidates",
      await Promise.all(found.candidates.slice(0, MOST).map((uri, i) => fileOf(uri, `edit ${i + 1}.png`))),
    );
  } catch (error) {
    complain("form", `The example could not be loaded: ${error.message}`);
  }
});

function fileOf(uri, name) {
  const bytes = Uint8Array.from(atob(uri.split(",")[1]), (letter) => letter.charCodeAt(0));
  return new File([bytes], name, { type: "image/png" });
}

// Asking the server

async function ask(path, picked, fields = {}) {
  const form = new FormData();
  form.append("instruction", picked.instruction);
  for (const [name, value] of Object.entries(fields)) form.append(name, String(value));
  for (const one of picked.source) form.append("source", one.file, "source");
  for (const one of picked.candidates) form.append("candidate", one.file, "candidate");
  const answer = await fetch(path, { method: "POST", body: form });
  if (!answer.ok) throw new Error(await wordsOf(answer));
  const found = await answer.json();
  return found.groups[0].candidates;
}

async function wordsOf(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered ${answer.status}`;
  }
}

async function busy(button, words, work) {
  button.disabled = true;
  at("state").textContent = words;
  try {
    await work();
  } finally {
    button.disabled = false;
    at("state").textContent = "";
  }
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  quiet();
  const instruction = at("instruction").value.trim();
  if (!instruction) complain("instruction", "Say what was to be done.");
  if (!chosen.candidates.length) complain("candidates", "Give at least one edited picture.");
  if (!instruction || !chosen.candidates.length) {
    at(instruction ? "candidates" : "instruction").focus();
    return;
  }
  const picked = { instruction, source: [...chosen.source], candidates: [...chosen.candidates] };
  busy(at("rank"), "Scoring …", async () => {
    try {
      const answers = await ask("/v1/score", picked);
      const rows = answers.map((answer, i) => ({ picture: picked.candidates[i], answer, text: "" }));
      const bad = rows.filter((row) => row.answer.error);
      if (bad.length === rows.length && bad[0].answer.error.code === "source") {
        complain("source", bad[0].answer.error.message);
        return;
      }
      rows.sort((a, b) => (b.answer.reward ?? -Infinity) - (a.answer.reward ?? -Infinity));
      ranked = { ...picked, rows };
      render();
      at("result-label").focus();
    } catch (error) {
      complain("form", `Not scored: ${error.message}`);
    }
  });
});

at("critique").addEventListener("click", () => {
  complain("result", "");
  const asked = ranked;
  const good = asked.rows.filter((row) => !row.answer.error);
  busy(at("critique"), "Writing …", async () => {
    try {
      const picked = { ...asked, candidates: good.map((row) => row.picture) };
      const texts = await ask("/v1/critique", picked);
      if (asked !== ranked) return; // another ranking has come in between
      good.forEach((row, i) => (row.text = texts[i].text ?? texts[i].error.message));
      render();
    } catch (error) {
      complain("result", `No critiques: ${error.message}`);
    }
  });
});

// Showing the answer

const number = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(4);

function place(row, index) {
  return row.answer.error ? row.picture.file.name : `${index + 1}. ${row.picture.file.name}`;
}

function render() {
  const rewards = ranked.rows.filter((row) => !row.answer.error).map((row) => row.answer.reward);
  const [low, high] = [Math.min(...rewards), Math.max(...rewards)];
  at("ranking").replaceChildren(
    ...ranked.rows.map((row, index) => {
      const { answer } = row;
      const image = make("img", { src: row.picture.url, alt: row.picture.file.name });
      const title = make("div", { class: "title" }, make("span", { class: "place" }, place(row, index)));
      const body = make("div", { class: "row" }, title);
      if (answer.error) {
        body.append(make("p", { class: "error" }, answer.error.message));
        return make("li", {}, image, body);
      }
      title.append(make("span", { class: "number" }, number(answer.reward)));
      const fill = make("i");
      fill.style.width = `${high > low ? (100 * (answer.reward - low)) / (high - low) : 100}%`;
      body.append(make("div", { class: "bar", "aria-hidden": "true" }, fill), details(answer));
      if (row.text) body.append(make("p", { class: "said" }, row.text));
      return make("li", index === 0 ? { class: "first" } : {}, image, body);
    }),
  );
  at("critique").hidden = !rewards.length;
  at("result").hidden = false;
  drawSheet();
}

function details(answer) {
  const pairs = Object.entries(answer.dimensions).map(([name, column]) => [name, column.reward]);
  const shown = pairs.length > 1 ? pairs : [];
  if (answer.normalised !== null) shown.push(["normalised", answer.normalised]);
  return make(
    "dl",
    {},
    ...shown.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, number(value)))),
  );
}

// The sheet: source and edits side by side with their numbers, as one PNG

async function drawSheet() {
  const drawn = ranked;
  const link = at("sheet");
  link.hidden = true;
  const tiles = [
    ...drawn.source.map((picture) => ({ picture, lines: ["source"] })),
    ...drawn.rows.map((row, index) => ({
      picture: row.picture,
      lines: row.answer.error
        ? [place(row, index), row.answer.error.message]
        : [place(row, index), number(row.answer.reward), row.text],
    })),
  ];
  const canvas = document.createElement("canvas");
  const pen = canvas.getContext("2d");
  const font = "14px system-ui, sans-serif";
  pen.font = font;
  const gap = 12;
  const line = 18;
  const width = gap + tiles.length * (SIDE + gap);
  const title = wrap(pen, drawn.instruction, width - 2 * gap);
  for (const tile of tiles) tile.wrapped = tile.lines.flatMap((text) => wrap(pen, text, SIDE));
  const top = gap + line * title.length + gap;
  canvas.width = width;
  canvas.height = top + SIDE + gap + line * Math.max(...tiles.map((tile) => tile.wrapped.length)) + gap;
  pen.font = font; // setting the size has reset it
  pen.fillStyle = "#ffffff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.fillStyle = "#1d2328";
  pen.textBaseline = "top";
  title.forEach((text, i) => pen.fillText(text, gap, gap + i * line));
  for (const [index, tile] of tiles.entries()) {
    const left = gap + index * (SIDE + gap);
    try {
      const picture = await createImageBitmap(tile.picture.file);
      const scale = SIDE / Math.max(picture.width, picture.height);
      pen.drawImage(picture, left, top, picture.width * scale, picture.height * scale);
      picture.close();
    } catch {
      pen.strokeRect(left, top, SIDE, SIDE); // a picture that cannot be shown; its error stands below
    }
    tile.wrapped.forEach((text, i) => pen.fillText(text, left, top + SIDE + gap + i * line));
  }
  const file = await new Promise((done) => canvas.toBlob(done, "image/png"));
  if (drawn !== ranked || !file) return;
  if (link.href) URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(file);
  link.hidden = false;
}

function wrap(pen, text, width) {
  const lines = [];
  for (const paragraph of text.split("\n")) {
    let current = "";
    for (const word of paragraph.split(/\s+/)) {
      let rest = word;
      if (current && pen.measureText(`${current} ${rest}`).width <= width) {
        current += ` ${rest}`;
        continue;
      }
      if (current) lines.push(current);
      while (pen.measureText(rest).width > width) {
        let count = rest.length;
        while (count > 1 && pen.measureText(rest.slice(0, count)).width > width) count -= 1;
        lines.push(rest.slice(0, count));
        rest = rest.slice(count);
      }
      current = rest;
    }
    if (current) lines.push(current);
  }
  return lines;
}
