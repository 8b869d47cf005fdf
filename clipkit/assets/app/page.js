// Four forms; each sends what it holds and shows the answer. What the server says is put in as text, never as HTML.

const $ = (selector, within = document) => within.querySelector(selector);
const about = await (await fetch("/api/about")).json();

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// Tabs, with the arrow keys.

const tabs = [...document.querySelectorAll("[role=tab]")];
function choose(tab) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
  }
}
tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs[(i + step + tabs.length) % tabs.length];
    choose(next);
    next.focus();
  });
});

$("#about").textContent = `${about.version}, ${about.model}, ${about.pictures} pictures to search in`;
$("#source").textContent = about.source;

// Pictures: chosen, dropped, or from the gallery.

const invitations = new Map([...document.querySelectorAll(".drop")].map((drop) => [drop, $("span", drop).textContent]));
function show(drop) {
  const [file] = $("input", drop).files, image = $("img", drop), count = $("input", drop).files.length;
  if (image) {
    if (image.src) URL.revokeObjectURL(image.src);
    image.hidden = !file;
    if (file) image.src = URL.createObjectURL(file);
  }
  $("span", drop).textContent = !file ? invitations.get(drop) : count > 1 ? `${count} pictures` : file.name;
}
function give(drop, files) {
  const held = new DataTransfer();
  for (const file of files) held.items.add(file);
  $("input", drop).files = held.files;
  $("input", drop).dispatchEvent(new Event("change"));
}
for (const drop of document.querySelectorAll(".drop")) {
  $("input", drop).addEventListener("change", () => show(drop));
  for (const name of ["dragover", "dragleave", "drop"]) {
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
      if (name !== "drop") return;
      const files = [...event.dataTransfer.files];
      give(drop, $("input", drop).multiple ? files : files.slice(0, 1));
    });
  }
}
async function fromGallery(count) {
  const { rows } = await (await checked(await fetch(`/api/some/${count}`))).json();
  return Promise.all(rows.map(async (row) => {
    const found = await checked(await fetch(`/api/picture/${row}`));
    return new File([await found.blob()], `picture ${row}`, { type: "image/png" });
  }));
}
for (const [id, count] of [["classify", 1], ["compare", 4]]) {
  $(`#${id} .example`).addEventListener("click", () => fromGallery(count)
    .then((files) => give($(`#${id} .drop`), files), (error) => say($(`#${id}`), error.message, true)));
}
// A search is by words or by a picture: what is given last counts, and is all that is shown.
$("#search [name=picture]").addEventListener("change", ({ target }) => {
  if (target.files.length) $("#search [name=text]").value = "";
});
$("#search [name=text]").addEventListener("input", ({ target }) => {
  if (target.value && $("#search [name=picture]").files.length) give($("#search .drop"), []);
});

// Asking.

function say(form, message, wrong = false) {
  const output = $("output", form);
  output.textContent = message;
  output.classList.toggle("wrong", wrong);
}
async function checked(response) {
  if (!response.ok) throw new Error((await response.json().catch(() => ({}))).error ?? response.statusText);
  return response;
}
function answer(id, work) {
  const form = document.getElementById(id);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = $("button:not([type])", form);
    button.disabled = true;
    say(form, "…");
    try {
      say(form, (await work(form, new FormData(form))) ?? "");
    } catch (error) {
      say(form, error.name === "AbortError" ? "stopped" : error.message, error.name !== "AbortError");
    } finally {
      button.disabled = false;
    }
  });
}
const ask = async (what, body) => (await checked(await fetch(`/api/${what}`, { method: "POST", body }))).json();
function chosen(data, name) {
  const files = data.getAll(name).filter((file) => file.size);
  data.delete(name);
  for (const file of files) data.append(name, file);
  return files;
}

function guessed(words) { // what the model was given no meaning of
  return words.length ? `guessed: no caption that this model learned from had ${words.map((w) => `"${w}"`).join(", ")}` : "";
}

answer("classify", async (form, data) => {
  if (!chosen(data, "picture").length) throw new Error("choose a picture first");
  const { guesses, unknown_words } = await ask("classify", data);
  $(".bars", form).replaceChildren(...guesses.map(({ label, probability }) => element("li", {},
    element("span", { textContent: label }),
    element("meter", { value: probability }),
    element("b", { textContent: `${(100 * probability).toFixed(1)} %` }))));
  return guessed(unknown_words);
});

answer("search", async (form, data) => {
  chosen(data, "picture");
  const { hits, unknown_words } = await ask("search", data);
  $(".hits", form).replaceChildren(...hits.map(({ key, row, score }) => element("figure", {},
    element("img", { src: `/api/picture/${row}`, alt: key, loading: "lazy" }),
    element("span", { textContent: `${score.toFixed(3)} ${key}` }))));
  return guessed(unknown_words);
});

let drawing = new AbortController();
$("#draw .stop").addEventListener("click", () => drawing.abort());
if (about.cannot_draw) {
  say($("#draw"), about.cannot_draw, true);
  $("#draw button:not([type])").disabled = true;
}
for (const name of ["scale", "cfg_scale"]) { // a model may know one, the other, or both
  const field = $(`#draw [name=${name}]`);
  field.disabled = field.parentElement.hidden = about[name] == null;
  field.value = about[name] ?? "";
}
answer("draw", async (form, data) => {
  const body = Object.fromEntries(data);
  for (const name in body) if ($(`[name=${name}]`, form).type === "number") body[name] = Number(body[name]);
  const bar = $("progress", form), stop = $(".stop", form), image = $("img", form);
  drawing = new AbortController();
  stop.disabled = bar.hidden = false;
  bar.removeAttribute("value"); // waiting for its turn
  try {
    const response = await checked(await fetch("/api/draw", {
      method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" },
      signal: drawing.signal,
    }));
    for await (const event of lines(response.body)) {
      if (event.error) throw new Error(event.error);
      $("figure", form).hidden = false;
      image.src = event.picture;
      image.alt = body.prompt;
      if (event.step) {
        bar.value = event.step / event.of;
        say(form, `step ${event.step} of ${event.of}`);
      } else {
        $("figcaption", form).textContent = `CLIP scores ${event.scores.map((s) => s.toFixed(3)).join(" ")}`;
        const unknown = guessed(event.about.unknown_words);
        return unknown ? `done, but ${unknown}` : "done";
      }
    }
  } finally {
    stop.disabled = bar.hidden = true;
  }
});
async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const found = (held + part.value).split("\n");
    held = found.pop();
    for (const line of found) yield JSON.parse(line);
  }
}

answer("compare", async (form, data) => {
  const files = chosen(data, "pictures");
  if (!files.length) throw new Error("choose some pictures first");
  const { texts, cosines, unknown_words } = await ask("similarity", data);
  const all = cosines.flat(), low = Math.min(...all), high = Math.max(...all);
  const head = element("tr", {}, element("th"), ...files.map((file) =>
    element("th", {}, element("img", { src: URL.createObjectURL(file), alt: file.name }))));
  const rows = texts.map((text, i) => element("tr", {}, element("th", { textContent: text }),
    ...cosines[i].map((value) => {
      const share = (value - low) / (high - low || 1);
      const cell = element("td", { textContent: value.toFixed(2), className: share > 0.5 ? "high" : "low" });
      cell.style.background = `hsl(${250 - 190 * share} 55% ${28 + 37 * share}%)`;
      return cell;
    })));
  $("table", form).replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
  return guessed(unknown_words);
});
