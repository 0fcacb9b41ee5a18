// Draws with the server that this page came from, and shows pictures as they come about.

const $ = (id) => document.getElementById(id);
const NUMBERS = ["n", "seed", "steps", "guidance", "shift", "strength"];
const TEXTS = ["prompt", "negative_prompt", "model", "size", "sampler"];
const PREVIEWS = 12;
const HISTORY = 48;

let models = [];
let running = null;

const headers = () => ($("token").value ? { Authorization: `Bearer ${$("token").value}` } : {});

function say(text, failed = false) {
  $("message").textContent = text;
  $("message").classList.toggle("failed", failed);
}

async function failure(response) {
  if (response.status === 401) $("access").hidden = false;
  const body = await response.json().catch(() => ({}));
  return new Error(body.error?.message ?? `the server answered ${response.status}`);
}

async function loadModels() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await failure(response);
  models = (await response.json()).data;
  $("model").replaceChildren(new Option("by traffic", ""), ...models.map((m) => new Option(m.id, m.id)));
  $("sampler").replaceChildren(
    new Option("the model's", ""), ...models[0].samplers.map((name) => new Option(name, name)));
  showDefaults();
}

function showDefaults() {
  const model = models.find((m) => m.id === $("model").value) ?? models[0];
  for (const name of ["size", "steps", "guidance", "shift"]) $(name).placeholder = model.defaults[name];
  $("n").max = model.most_images;
  $("guidance").disabled = !model.guided;
  const nets = Object.keys(model.controls);
  $("net").replaceChildren(...nets.map((name) => new Option(name, name)));
  for (const label of document.querySelectorAll(".control")) label.hidden = !nets.length;
}

function asDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

// The request's fields; what is empty is left to the server.
async function fields() {
  const body = { stream: true, progress: true, partial_images: PREVIEWS };
  for (const name of TEXTS) if ($(name).value) body[name] = $(name).value;
  for (const name of NUMBERS) if ($(name).value && !$(name).disabled) body[name] = Number($(name).value);
  if (!$("image").files.length) delete body.strength;
  const followed = $("followed").files[0];
  if (followed && $("net").value) {
    const control = { image: await asDataUrl(followed), scale: Number($("scale").value) };
    body.control = { [$("net").value]: control };
  }
  return body;
}

function send(body, signal) {
  const picture = $("image").files[0];
  if (!picture) {
    return fetch("v1/images/generations", {
      method: "POST", signal, body: JSON.stringify(body),
      headers: { "Content-Type": "application/json", ...headers() },
    });
  }
  const form = new FormData();
  for (const [name, value] of Object.entries(body)) {
    form.append(name, typeof value === "object" ? JSON.stringify(value) : value);
  }
  form.append("image", picture);
  return fetch("v1/images/edits", { method: "POST", signal, body: form, headers: headers() });
}

// The data of server-sent events; EventSource cannot send a body.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let text = ""; ;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const whole = text.split("\n\n");
    text = whole.pop();
    for (const one of whole) {
      const data = one.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}

function show(index, data, about) {
  while ($("pictures").children.length <= index) {
    $("pictures").append(document.createElement("img"));
  }
  const picture = $("pictures").children[index];
  picture.src = `data:image/png;base64,${data}`;
  picture.alt = about;
}

function remember(body, event) {
  const picture = document.createElement("img");
  picture.src = `data:image/png;base64,${event.b64_json}`;
  picture.alt = picture.title = `${body.prompt} (seed ${event.seed}, ${event.model})`;
  const entry = document.createElement("button");
  entry.type = "button";
  entry.append(picture);
  // A click brings the request back, with the seed that it had.
  entry.addEventListener("click", () => {
    for (const name of [...TEXTS, ...NUMBERS]) $(name).value = body[name] ?? "";
    $("n").value = 1;
    $("seed").value = event.seed;
    say(`Seed ${event.seed} of ${event.model}.`);
    $("pictures").replaceChildren();
    show(0, event.b64_json, body.prompt);
  });
  $("history").prepend(entry);
  while ($("history").children.length > HISTORY) $("history").lastChild.remove();
}

function take(body, event) {
  if (event.error) throw new Error(event.error.message);
  const kind = event.type.split(".")[1];
  if (kind === "progress") {
    $("progress").max = event.steps;
    $("progress").value = event.step;
    say(`Step ${event.step} of ${event.steps}`);
  } else if (kind === "partial_image") {
    show(event.index, event.b64_json, "unfinished");
  } else {
    show(event.index, event.b64_json, body.prompt);
    remember(body, event);
    const notes = event.notes.length ? ` — ${event.notes.join("; ")}` : "";
    say(`Seed ${event.seed}, ${event.model}, ${event.timings.total.toFixed(2)} s${notes}`);
  }
}

async function draw(submission) {
  submission.preventDefault();
  if (running) return;
  running = new AbortController();
  $("draw").disabled = true;
  $("stop").disabled = false;
  $("progress").value = 0;
  $("pictures").replaceChildren();
  say("Waiting for its turn.");
  try {
    if (!models.length) await loadModels();
    const body = await fields();
    const response = await send(body, running.signal);
    if (!response.ok) throw await failure(response);
    for await (const event of events(response)) take(body, event);
  } catch (error) {
    const stopped = error.name === "AbortError";
    say(stopped ? "Stopped." : error.message, !stopped);
  } finally {
    running = null;
    $("draw").disabled = false;
    $("stop").disabled = true;
  }
}

$("request").addEventListener("submit", draw);
$("stop").addEventListener("click", () => running?.abort());
$("model").addEventListener("change", showDefaults);
$("token").addEventListener("change", () => loadModels().catch((error) => say(error.message, true)));
loadModels().catch((error) => say(error.message, true));
