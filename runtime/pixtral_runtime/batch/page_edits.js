// Answers that were edited by hand: kept in this browser, and downloaded as the files that belong beside the pictures.

const edits = new Map();  // text by the record's index
let isDownloaded = true;

// The text of a record that can be edited: what its sidecar holds, or the answer.
function originalOf(record) {
  return record.sidecar ? record.sidecar[1] : record.answer ?? "";
}

function textOf(index) {
  return edits.get(index) ?? originalOf(records[index]);
}

// Take over a text, and say whether it is another one than before. A field of text knows one kind of line end.
function edit(index, text) {
  if (text === textOf(index) || text === textOf(index).replace(/\r\n?/g, "\n")) return false;
  if (text === originalOf(records[index])) edits.delete(index); else edits.set(index, text);
  isDownloaded = edits.size === 0;
  return true;
}

// Keep the edits in this browser, and say whether it could.
function keepEdits() {
  try {
    if (edits.size) localStorage.setItem(STORE, JSON.stringify({isDownloaded, edits: [...edits]}));
    else localStorage.removeItem(STORE);
    return true;
  } catch {
    return false;
  }
}

function findEdits() {
  try {
    const kept = JSON.parse(localStorage.getItem(STORE)) ?? {edits: []};
    for (const [index, text] of kept.edits) {
      if (Number.isInteger(index) && records[index] && typeof text === "string") edit(index, text);
    }
    isDownloaded = edits.size === 0 || kept.isDownloaded === true;
  } catch {
    edits.clear();  // nothing can be kept here, or something else has
  }
}

addEventListener("beforeunload", event => { if (!isDownloaded) event.preventDefault(); });

// The text of a sidecar, which `pixtral run` writes in one line as well.
function sidecarText(text) {
  if (about.as_written) return text;
  return text.split(/\r\n|[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]/).map(line => line.trim()).filter(line => line).join(" ");
}

// The folders and the name of a record's sidecar, as the job has them; null where it is not about one file.
function sidecarParts(record) {
  const [path] = record.images.length === 1 ? record.images[0] : [null];
  if (record.sidecar) return record.sidecar[0].split("/");
  if (path === null || path.startsWith("data:")) return null;
  const isPart = /#(page|t)=[^/]*$/.test(path);  // a page or a frame: all of its file have one stem
  return ((isPart ? path : path.replace(/(?<=[^/.][^/]*)\.[^/.]*$/, "")) + about.ending).split("/");
}

// How many folders all pictures have in common, where some path does not begin in the folder of work.
function commonFolders(paths) {
  if (!paths.some(([first, ...rest]) => (first === "" && rest.length) || [first, ...rest].includes(".."))) return 0;
  const [one, ...others] = paths;
  let depth = one.length - 1;
  for (const path of others) {
    depth = Math.min(depth, path.length - 1);
    for (let at = 0; at < depth; at++) if (path[at] !== one[at]) depth = at;
  }
  return depth;
}

// A name for each edited record's file, by index: relative, without ways out of the folder, and no two the same. The
// second list is of those that had to be another than their record's.
function sidecarNames() {
  const depth = commonFolders(records.map(sidecarParts).filter(parts => parts !== null));
  const names = new Map(), taken = new Set(), renamed = [];
  for (const index of [...edits.keys()].sort((a, b) => a - b)) {
    const parts = sidecarParts(records[index])?.slice(depth) ?? [records[index].id.replaceAll("/", "_") + about.ending];
    const path = parts.map(part => part.toWellFormed().replace(/[\\\x00-\x1f\x7f]/g, "_"))
      .filter(part => !["", ".", ".."].includes(part)).join("/") || "caption" + about.ending;
    let name = path;
    for (let copy = 2; taken.has(name.toLowerCase()); copy++) name = path.replace(/((?:\.[^/.]*)?)$/, ` (${copy})$1`);
    if (name !== path) renamed.push(name);
    taken.add(name.toLowerCase());
    names.set(index, name);
  }
  return [names, renamed];
}

function download(name, type, parts) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(parts, {type}));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  isDownloaded = true;
  keepEdits();
}

// Download the edited sidecars, and say which got another name than their picture's.
function downloadSidecars() {
  const [names, renamed] = sidecarNames();
  download("sidecars.zip", "application/zip", zip([...names].map(([index, name]) => [name, sidecarText(textOf(index))])));
  return renamed;
}

function downloadLines() {
  const lines = [...edits.keys()].sort((a, b) => a - b).map(index => ({id: records[index].id, answer: textOf(index)}));
  download("edits.jsonl", "application/jsonl", lines.map(line => JSON.stringify(line) + "\n"));
}
