"use strict";
// Asks v1/chat/completions and shows the answer while it comes. Whatever comes from outside becomes text, never markup.
// The conversation and the key are in this page's memory alone.

const at = id => document.getElementById(id);
const conversation = []; // messages that the next question sends along
let pictures = []; // of the next question: {name, url}
let reading = Promise.resolve(); // files on their way to `pictures`, in order
let asking = null; // an AbortController while an answer is under way

function element(kind, name, text) {
  const made = document.createElement(kind);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Makes a change to the page. Whoever is at its end stays there.
function following(change) {
  const page = document.documentElement, follows = page.scrollHeight - innerHeight - scrollY < 80;
  change();
  if (follows) scrollTo(0, page.scrollHeight);
}

// The server

function headers() {
  const key = at("key").value.trim();
  return {"content-type": "application/json", ...(key && {authorization: `Bearer ${key}`})};
}

async function reached(path, options) {
  let response;
  try {
    response = await fetch(path, {headers: headers(), cache: "no-store", ...options});
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error(`The server cannot be reached: ${error.message}`);
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const again = response.headers.get("retry-after");
  if (response.status === 401) at("settings").open = true;
  throw new Error((said?.error?.message ?? `The server says ${response.status} ${response.statusText}`) +
    (again ? ` (again in ${again} s)` : ""));
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) throw new Error("The answer broke off.");
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

async function showModel() {
  try {
    const models = await (await reached("v1/models")).json();
    at("model").value = models.data[0].id;
    at("notice").textContent = "";
  } catch (error) {
    at("notice").textContent = error.message;
  }
}

// Pictures

const dataUrl = file => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});

function add(files) {
  reading = [...files].reduce((before, file) => before.then(async () => {
    if (file.type && !file.type.startsWith("image/")) throw new Error("it is no picture");
    pictures.push({name: file.name, url: await dataUrl(file)});
    at("notice").textContent = "";
  }).catch(error => {
    at("notice").textContent = `${file.name}: ${error.message}`;
  }).then(showPictures), reading);
}

function shown({name, url}) {
  const item = element("li"), image = element("img");
  image.src = url;
  image.alt = image.title = name;
  item.append(image);
  return item;
}

function showPictures() {
  const items = pictures.map(picture => {
    const item = shown(picture), button = element("button");
    button.type = "button";
    button.setAttribute("aria-label", `Remove ${picture.name}`);
    button.append(element("span", "", "×"));
    button.addEventListener("click", () => {
      pictures = pictures.filter(one => one !== picture);
      showPictures();
      at("question").focus();
    });
    item.append(button);
    return item;
  });
  following(() => at("pictures").replaceChildren(...items));
}

// Answers

const seconds = ms => `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;

function timing(started, first, ended, made) {
  if (first === null) return seconds(ended - started);
  const rate = made > 1 ? ` · ${((made - 1) * 1000 / (ended - first)).toFixed(1)} tokens/s` : "";
  return `first token after ${seconds(first - started)}${rate} · ${seconds(ended - started)} in all`;
}

function counts({prompt_tokens: read, completion_tokens: made, prompt_tokens_details: details}) {
  return `${read} prompt tokens (${details.image_tokens} of images, ${details.cached_tokens} cached) · ${made} new`;
}

function grow(paragraph, text) {
  following(() => paragraph.firstChild ? paragraph.firstChild.appendData(text) : paragraph.append(text));
}

function newTurn(text, sent) {
  const turn = element("article"), images = element("ul"), answer = element("p", "answer");
  images.append(...sent.map(shown));
  turn.append(images);
  if (text) turn.append(element("p", "question", text));
  turn.append(answer);
  turn.setAttribute("aria-busy", "true"); // a screen reader then reads the answer when it is whole
  at("talk").append(turn);
  scrollTo(0, document.documentElement.scrollHeight);
  return {turn, answer};
}

function thinkingIn(turn, answer) {
  const folded = element("details", "thinking"), text = element("p");
  folded.append(element("summary", "", "Thinking"), text);
  turn.insertBefore(folded, answer);
  return text;
}

function number(id) {
  const text = at(id).value.trim();
  return text === "" ? undefined : Number(text);
}

function bodyOf(message) {
  const system = at("system").value.trim();
  return JSON.stringify({
    messages: [...(system ? [{role: "system", content: system}] : []), ...conversation, message],
    temperature: number("temperature"),
    max_tokens: number("max_tokens"),
    stream: true,
    stream_options: {include_usage: true},
  });
}

function setAsking(controller) {
  asking = controller;
  at("send").hidden = controller !== null;
  at("stop").hidden = controller === null;
}

async function send() {
  if (asking !== null) return;
  if (!at("options").checkValidity()) {
    at("settings").open = true;
    at("options").reportValidity();
    return;
  }
  const controller = new AbortController();
  setAsking(controller);
  await reading;
  const text = at("question").value.trim(), sent = pictures;
  if ((text || sent.length) && !controller.signal.aborted) await answer(text, sent, controller);
  if (asking === controller) setAsking(null);
}

async function answer(text, sent, controller) {
  const detail = at("detail").value;
  const message = {role: "user", content: [
    ...sent.map(({url}) => ({type: "image_url", image_url: {url, detail}})),
    ...(text ? [{type: "text", text}] : []),
  ]};
  const {turn, answer} = newTurn(text, sent);
  const started = performance.now();
  let first = null, thinking = null, usage = null, end = null, failure = null;
  at("question").value = at("notice").textContent = "";
  at("intro").hidden = true;
  pictures = [];
  showPictures();
  try {
    const options = {method: "POST", body: bodyOf(message), signal: controller.signal};
    for await (const event of events(await reached("v1/chat/completions", options))) {
      usage = event.usage ?? usage;
      if (!event.choices.length) continue;
      const {delta, finish_reason: reason} = event.choices[0];
      if (delta.content || delta.reasoning_content) first ??= performance.now();
      if (delta.reasoning_content) grow(thinking ??= thinkingIn(turn, answer), delta.reasoning_content);
      if (delta.content) grow(answer, delta.content);
      end = reason ?? end;
    }
  } catch (error) {
    failure = error;
  }
  const stopped = failure?.name === "AbortError";
  if (!turn.isConnected) return; // another conversation has begun
  const told = timing(started, first, performance.now(), usage?.completion_tokens);
  following(() => {
    if (end === "length") turn.append(element("p", "facts cut", "cut off: no more tokens were allowed"));
    if (stopped) turn.append(element("p", "facts cut", "stopped"));
    else if (failure) turn.append(element("p", "error", failure.message));
    if (first !== null || !failure) turn.append(element("p", "facts", told));
    if (usage) turn.append(element("p", "facts", counts(usage)));
    turn.setAttribute("aria-busy", "false");
  });
  if (answer.textContent && (stopped || !failure)) {
    conversation.push(message, {role: "assistant", content: answer.textContent});
  } else if (!at("question").value && !pictures.length) { // no part of the conversation: to be asked again
    at("question").value = text;
    pictures = sent;
    showPictures();
  }
}

function begin() {
  asking?.abort();
  setAsking(null);
  conversation.length = 0;
  pictures = [];
  showPictures();
  at("talk").replaceChildren();
  at("question").value = at("notice").textContent = "";
  at("intro").hidden = false;
  at("question").focus();
}

// What the user does

at("ask").addEventListener("submit", event => { event.preventDefault(); send(); });
at("options").addEventListener("submit", event => event.preventDefault());
at("stop").addEventListener("click", () => { asking?.abort(); at("question").focus(); });
at("new").addEventListener("click", begin);
at("key").addEventListener("change", showModel);
at("question").addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
document.addEventListener("keydown", event => { if (event.key === "Escape") asking?.abort(); });
at("files").addEventListener("change", event => { add(event.target.files); event.target.value = ""; });
document.addEventListener("paste", event => {
  const {files, types} = event.clipboardData;
  if (!files.length || types.includes("text/plain")) return; // cells of a table come as text and as a picture of it
  event.preventDefault();
  add(files);
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, event => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    at("ask").classList.toggle("over", kind === "dragover");
    if (kind === "drop") add(event.dataTransfer.files);
  });
}
showModel();
