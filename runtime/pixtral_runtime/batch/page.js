// The rows of the page: what they show, which ones and in what order, and what keys and buttons do.

const at = id => document.getElementById(id);
const about = JSON.parse(at("records").textContent);
const records = about.records;
const STORE = `pixtral edits ${about.key}`, THEME = "pixtral theme";
const NARROW_PX = 544;
const LARGE = {line: 24.5, letter: 7.7}, SMALL = {line: 22, letter: 6.7};  // pixels of texts and of facts

const sum = times => Object.values(times).reduce((total, ms) => total + ms, 0);
const statusOf = record => record.error !== null ? "errors" : record.end === "length" ? "cut" : "whole";
const rank = {errors: 0, cut: 1, whole: 2};
const orders = {
  errors: (a, b) => rank[statusOf(a)] - rank[statusOf(b)],
  name: (a, b) => a.id < b.id ? -1 : a.id > b.id ? 1 : 0,
  slow: (a, b) => sum(b.times) - sum(a.times),
  long: (a, b) => (b.tokens[2] ?? 0) - (a.tokens[2] ?? 0),
  asked: () => 0,
};
const opened = new Set();  // indices of records whose thinking is shown
const searched = new Map();  // what is searched, by index
const waiting = new Set();  // pictures that have not arrived yet
let current = null;  // the index of the row that keys are about
let editing = null;
let isPressed = false;

function element(kind, name, text) {
  const made = document.createElement(kind);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function button(name, text, press) {
  const made = element("button", name, text);
  made.type = "button";
  made.addEventListener("click", press);
  return made;
}

function picture([path, number, width, height]) {
  const frame = element("span", "picture"), shown = element("img");
  Object.assign(shown, {width, height, alt: path});
  frame.title = path;
  frame.append(shown);
  if (!fillPicture(shown, number)) waiting.add([shown, number]);
  return frame;
}

// Show a picture's thumbnail, unless it has not arrived.
function fillPicture(shown, number) {
  const source = at(`p${number}`), isOver = document.readyState !== "loading";
  if (!isOver && !source?.nextSibling) return false;
  if (source?.textContent) shown.src = `data:image/jpeg;base64,${source.textContent}`;
  else shown.replaceWith(element("span", "none", "no picture"));
  return true;
}

function fillPictures() {
  for (const one of waiting) if (!one[0].isConnected || fillPicture(...one)) waiting.delete(one);
}

function factsOf(record) {
  const [prompt, image, made] = record.tokens;
  const parts = Object.entries(record.times).map(([stage, ms]) => `${stage} ${ms.toFixed(ms < 10 ? 1 : 0)} ms`);
  if (prompt !== null) parts.unshift(`${prompt} prompt tokens, ${image} of images`);
  if (made !== null) parts.unshift(`${made} new tokens`);
  return parts.join(" · ");
}

function thinkingOf(index) {
  const thinking = element("details", "facts");
  thinking.append(element("summary", "", "thinking"), element("p", "", records[index].thinking));
  thinking.open = opened.has(index);
  thinking.addEventListener("toggle", () => thinking.open ? opened.add(index) : opened.delete(index));
  return thinking;
}

function headOf(index) {
  const record = records[index], head = element("div", "head");
  head.append(element("h2", "", record.id));
  if (edits.has(index)) {
    head.append(element("span", "badge", "edited"), button("", "Revert", () => revert(index)));
  }
  if (index !== editing) head.append(button("edit", "Edit", () => beginEdit(index)));
  return head;
}

function captionOf(index) {
  const record = records[index], text = textOf(index);
  if (index === editing) return editor(text);
  const shown = element("p", "answer", text);
  if (text === "") shown.classList.add("empty");
  shown.addEventListener("click", () => { if (getSelection().isCollapsed) beginEdit(index); });
  return shown;
}

function row(index) {
  const record = records[index], made = element("li"), pictures = element("div", "pictures"), body = element("div", "body");
  made.dataset.status = statusOf(record);
  made.dataset.index = index;
  made.tabIndex = 0;
  made.classList.toggle("edited", edits.has(index));
  pictures.append(...record.images.map(picture));
  body.append(headOf(index));
  const paths = record.images.map(([path]) => path).filter(path => !record.id.startsWith(path));
  if (paths.length) body.append(element("p", "facts", paths.join(", ")));
  body.append(element("p", "question", record.question));
  if (record.error !== null) body.append(element("p", "error", record.error), element("p", "facts", record.hint ?? ""));
  if (record.error === null || edits.has(index) || index === editing) body.append(captionOf(index));
  if (index === editing) body.append(element("p", "facts", "Ctrl+Enter, or leaving the field, saves · Esc does not"));
  if (edits.has(index)) body.append(element("p", "facts", `before: ${originalOf(record)}`));
  else if (record.sidecar && record.answer?.trim() !== record.sidecar[1]) {
    body.append(element("p", "facts", `the model's answer: ${record.answer}`));
  }
  if (record.thinking !== null) body.append(thinkingOf(index));
  for (const [label, text] of record.notes) body.append(element("p", "note", `${label}: ${text}`));
  if (statusOf(record) === "cut") body.append(element("p", "cut", "cut off at the limit of new tokens"));
  body.append(element("p", "facts", factsOf(record)));
  made.append(pictures, body);
  return made;
}

// About how high a row will be, in pixels.
function estimate(index, width) {
  const record = records[index], isNarrow = width < NARROW_PX, room = width - (isNarrow ? 140 : 215);
  const high = ({line, letter}, ...texts) => texts.join("\n").split("\n")
    .reduce((sum, text) => sum + line * Math.max(1, Math.ceil(text.length * letter / room)), 0);
  let words = high(LARGE, `${record.id} Edit`, record.question, record.error ?? textOf(index)) + high(SMALL, factsOf(record));
  words += record.notes.reduce((sum, note) => sum + high(LARGE, note.join(": ")), 0);
  if (record.error !== null) words += high(SMALL, record.hint ?? "");
  else if (record.sidecar) words += high(SMALL, `the model's answer: ${record.answer}`);
  const pictures = record.images.reduce((sum, [, , , height]) => sum + (isNarrow ? height * .6 : height) + 4, 0);
  return Math.max(words, pictures) + 30;
}

const list = new LongList(at("list"), records.length, {
  make: row,
  estimate,
  leave: index => { if (index === editing) endEdit(); },
});

function editor(text) {
  const field = element("textarea", "answer");
  field.value = text;
  field.rows = Math.min(12, text.split("\n").length + 1);
  field.setAttribute("aria-label", "Caption");
  field.addEventListener("blur", () => leaveEdit(field, editing));
  field.addEventListener("keydown", event => {
    if (event.key !== "Escape" && !(event.key === "Enter" && (event.ctrlKey || event.metaKey))) return;
    event.preventDefault();
    const index = editing;
    endEdit(event.key === "Enter");
    focusRow(index);
  });
  return field;
}

function beginEdit(index) {
  if (editing !== null) endEdit();
  current = editing = index;
  list.refresh(index);
  list.reveal(list.items.indexOf(index));
  const field = list.rows.get(index).querySelector("textarea");
  field.focus({preventScroll: true});
  field.setSelectionRange(field.value.length, field.value.length);
}

// A row is made anew when the mouse is up again: what it is about to click would move away.
function leaveEdit(field, index) {
  const end = () => { if (index !== null && editing === index) endEdit(); };
  if (document.activeElement === field) return;  // the window has lost the focus
  if (isPressed) addEventListener("pointerup", () => setTimeout(end), {once: true}); else end();
}

function endEdit(isKept = true) {
  const index = editing, text = list.rows.get(index).querySelector("textarea").value;
  editing = null;  // first, since the field loses the focus when its row is made anew
  if (isKept) change(index, text); else list.refresh(index);
}

function change(index, text) {
  if (edit(index, text)) {
    searched.delete(index);
    tell(keepEdits() ? "" : "This browser keeps nothing for this page: download the edits before you leave it.");
    showEdits();
  }
  list.refresh(index);
}

function revert(index) {
  change(index, originalOf(records[index]));
  focusRow(index);
}

function tell(text) {
  at("notice").textContent = text;
}

function showEdits() {
  at("edits").hidden = edits.size === 0;
  at("sidecars").textContent = `Download ${edits.size} edited sidecar${edits.size === 1 ? "" : "s"}`;
  for (const option of at("status").options) {
    if (option.value === "edited") option.textContent = `edited (${edits.size})`;
  }
}

function focusRow(index) {
  const place = list.items.indexOf(index);
  if (place < 0) return;
  current = index;
  list.reveal(place).focus({preventScroll: true});
}

// Go to the next row, or one before, from where the keys or the window are.
function step(by) {
  const place = list.items.indexOf(current), isSeen = list.rows.has(current);
  const next = place < 0 || !isSeen ? list.firstInView() : place + by;
  if (list.items.length) focusRow(list.items[Math.min(Math.max(next, 0), list.items.length - 1)]);
}

function textToSearch(index) {
  if (!searched.has(index)) {
    const record = records[index];
    searched.set(index, [record.id, record.question, record.answer, edits.get(index) ?? record.sidecar?.[1], record.error,
                         ...record.notes.map(([, text]) => text), ...record.images.map(([path]) => path)]
      .map(text => text ?? "").join("\n").toLowerCase());
  }
  return searched.get(index);
}

const belongs = (index, wanted) => wanted === "all" || (wanted === "edited" && edits.has(index)) ||
  statusOf(records[index]) === wanted || records[index].marks.includes(wanted);

function show() {
  const words = at("text").value.toLowerCase(), wanted = at("status").value, order = orders[at("order").value];
  const shown = [...records.keys()].filter(index => belongs(index, wanted) && (!words || textToSearch(index).includes(words)));
  shown.sort((a, b) => order(records[a], records[b]));
  const all = records.length.toLocaleString("en"), some = shown.length.toLocaleString("en");
  at("count").value = shown.length === records.length ? `${all} records` : shown.length ? `${some} of ${all}` : "nothing";
  list.show(shown);
}

function addChoices() {
  const marks = [...new Set(records.flatMap(record => record.marks))];
  at("status").append(...marks.map(mark => new Option(mark, mark)));
  for (const option of at("status").options) {
    const count = records.filter((_, index) => belongs(index, option.value)).length;
    option.textContent += ` (${count.toLocaleString("en")})`;
  }
}

function toggleHelp() {
  const isShown = at("help").toggleAttribute("hidden") === false;
  at("keys").setAttribute("aria-expanded", isShown);
}

function useTheme(name) {
  document.documentElement.style.colorScheme = name ?? "";
}

function toggleTheme() {
  const now = document.documentElement.style.colorScheme;
  const isDark = now ? now === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  useTheme(isDark ? "light" : "dark");
  try { localStorage.setItem(THEME, isDark ? "light" : "dark"); } catch { /* it holds for now */ }
}

// What a key does where no text is written, and what more where a row has the focus.
const actions = {
  "j": () => step(1),
  "k": () => step(-1),
  "/": () => at("text").select(),
  "?": toggleHelp,
  "e": () => { if (list.rows.has(current)) beginEdit(current); },
  "u": () => { if (edits.has(current)) revert(current); },
};
const rowActions = {"ArrowDown": actions.j, "ArrowUp": actions.k, "Enter": actions.e};

addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const isInRow = event.target.matches("li");
  if (event.target === at("text")) {
    if (event.key !== "Escape" && event.key !== "Enter") return;
    event.preventDefault();
    step(0);
    if (!list.items.length) at("text").blur();
    return;
  }
  if (event.target.matches("textarea, select, input")) return;
  const action = (isInRow && rowActions[event.key]) || actions[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});
addEventListener("pointerdown", () => { isPressed = true; }, {capture: true});
for (const name of ["pointerup", "pointercancel"]) addEventListener(name, () => { isPressed = false; }, {capture: true});
at("list").addEventListener("focusin", event => { current = Number(event.target.closest("li").dataset.index); });
for (const id of ["text", "status", "order"]) at(id).addEventListener("input", show);
at("theme").addEventListener("click", toggleTheme);
at("keys").addEventListener("click", toggleHelp);
at("sidecars").addEventListener("click", () => {
  const renamed = downloadSidecars();
  tell(renamed.length ? `Renamed, since two would be called the same: ${renamed.join(", ")}` : "");
});
at("lines").addEventListener("click", downloadLines);
try { useTheme(localStorage.getItem(THEME)); } catch { /* as the system has it */ }
findEdits();
addChoices();
showEdits();
show();
const arriving = setInterval(fillPictures, 60);
document.addEventListener("readystatechange", () => { clearInterval(arriving); fillPictures(); });
