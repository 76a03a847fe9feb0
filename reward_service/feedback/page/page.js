// The labelling page: asks for a name once, shows one pair after another and passes every choice to the outbox.
// Texts from the service are only set as textContent, because responses are untrusted.

import { Outbox, Refused, Shelf } from "./outbox.js";

const MAX_WAITING = 20;
const MAX_UNDO = 10;
const SUMMARY_EVERY = 5;
const TIMEOUT_MS = 20000;
const LOADING_AFTER_MS = 150;
const TRY_AGAIN_MS = 5000;
const KEYS = {
  ArrowLeft: "first", 1: "first", ArrowRight: "second", 2: "second", t: "tie", 0: "tie", s: "skip",
};
const ANNOUNCEMENTS = { first: "Response 1 chosen.", second: "Response 2 chosen.", tie: "Tie.", skip: "Skipped." };

const $ = (id) => document.getElementById(id);
const browser = new Shelf("antiphon.");
const undoable = new Shelf("antiphon.undoable.");
const token = readToken();

let annotator = browser.get("annotator");
let outbox = null;
let store = null;
let shown = null; // the pair on the screen
let upcoming = null; // a promise of the next pair, requested in advance
let past = []; // choices that can be undone: {id, pair}, the latest last
let turn = 0; // number of the current screen: responses for an older one are dropped
let tryingAgain = null;
let numDone = 0;
let numAll = 0;
let numSinceSummary = 0;
let lastRefusal = "";

function readToken() {
  const tokenInAddress = new URLSearchParams(location.hash.slice(1)).get("token");
  try {
    if (tokenInAddress) {
      sessionStorage.setItem("antiphon.token", tokenInAddress);
      history.replaceState(null, "", location.pathname + location.search);
    }
    return tokenInAddress ?? sessionStorage.getItem("antiphon.token");
  } catch {
    return tokenInAddress;
  }
}

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

async function ask(method, path, body) {
  const headers = { Accept: "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  let answer;
  try {
    response = await fetch(path, {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      cache: "no-store",
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
    answer = await response.json();
  } catch (error) {
    throw new Refused(response?.ok === false ? response.status : 0, `The service can’t be reached (${error.name}).`);
  }
  if (!response.ok) throw new Refused(response.status, answer?.error?.message ?? `The service answered ${response.status}.`);
  return answer;
}

/* Requests waiting to be sent */

function openOutbox(name) {
  if (store === name) return;
  outbox?.stop();
  store = name;
  recallPast();
  outbox = new Outbox(new Shelf(`antiphon.outbox.${name}.`), ({ method, path, body }) => ask(method, path, body), {
    changed: showNotice,
    refused: keepRefused,
  });
  outbox.flush();
}

function recallPast() {
  past = undoable.get(`${store}.${annotator}`) ?? [];
}

function setPast(entries) {
  past = entries.slice(-MAX_UNDO);
  undoable.set(`${store}.${annotator}`, past);
}

function keepRefused(request, error) {
  if (request.method === "DELETE" && error.status === 404) return; // the choice that it would undo was not accepted either
  browser.set(`refused.${request.body?.id ?? newId()}`, { request, message: error.message });
  lastRefusal = `${request.body ? "A choice" : "An undo"} was not accepted: ${error.message}`;
}

function waitingPairs() {
  if (!outbox) return [];
  return outbox
    .waiting()
    .filter(({ body }) => body?.pair && body.annotator === annotator)
    .map(({ body }) => body.pair);
}

function showNotice() {
  const num = outbox ? outbox.waiting().length : 0;
  const choices = num === 1 ? "1 choice waits" : `${num} choices wait`;
  let text = "";
  if (num && outbox.failure) {
    const kept = browser.isDurable && outbox.shelf.isDurable ? "kept in this browser and sent" : "sent";
    const why = outbox.failure.isLocked ? "The token was not accepted: reload the page to sign in. " : "No connection. ";
    text = `${why}${choices} to be sent: ${kept} when the service answers.`;
    if (!outbox.shelf.isDurable) text += " Keep this page open until then.";
  } else if (lastRefusal) {
    text = lastRefusal;
  }
  $("notice").hidden = !text;
  if ($("notice").textContent !== text) $("notice").textContent = text;
}

/* Asking for pairs */

async function fetchNext(alsoExcept) {
  const query = new URLSearchParams({ annotator });
  const except = new Set([...waitingPairs(), ...alsoExcept]);
  for (const pair of except) query.append("except", pair);
  const isSettled = outbox !== null && outbox.waiting().length === 0;
  const numDoneThen = numDone;
  const answer = await ask("GET", `v1/pairs/next?${query}`);
  return { ...answer, isSettled: isSettled && numDoneThen === numDone };
}

async function showNext() {
  turn += 1;
  const mine = turn;
  const isTrouble = !$("view-trouble").hidden;
  const loading = isTrouble ? null : setTimeout(() => mine === turn && view("loading"), LOADING_AFTER_MS);
  try {
    if (outbox && outbox.waiting().length >= MAX_WAITING) {
      throw outbox.failure ?? new Refused(0, "Too many choices wait to be sent.");
    }
    const asked = upcoming;
    upcoming = null;
    const answer = await (asked ? asked.catch(() => fetchNext([])) : fetchNext([]));
    if (mine !== turn) return;
    openOutbox(answer.store);
    follow(answer);
    showPair(answer.pair);
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    if (mine === turn) showTrouble(error);
  } finally {
    clearTimeout(loading);
  }
}

function follow({ progress, isSettled }) {
  if (isSettled || numAll === 0) numDone = progress.num_done + waitingPairs().length;
  numAll = Math.max(progress.num_done + progress.num_left, numDone);
}

function prefetch() {
  upcoming = fetchNext([shown.id]);
  upcoming.catch(() => {});
}

/* Choosing and undoing */

function choose(choice) {
  if (!shown || $("view-pair").hidden) return;
  const id = newId();
  const { id: pair, prompt, first, second } = shown;
  const body = { kind: "preference", id, annotator, pair, prompt, first, second, choice };
  lastRefusal = "";
  setPast([...past, { id, pair: shown }]);
  shown = null;
  numDone += 1;
  outbox.put({ method: "POST", path: "v1/feedback", body });
  $("announce").textContent = ANNOUNCEMENTS[choice];
  afterChange();
  showNext();
}

function undo() {
  const last = past.at(-1);
  if (!last) return;
  setPast(past.slice(0, -1));
  outbox.put({
    method: "DELETE",
    path: `v1/feedback/${encodeURIComponent(last.id)}?${new URLSearchParams({ annotator })}`,
  });
  numDone = Math.max(0, numDone - 1);
  upcoming = null;
  showPair(last.pair);
  afterChange();
  $("announce").textContent = "Undone. Choose again.";
}

function afterChange() {
  showProgress();
  showNotice();
  numSinceSummary += 1;
  if (numSinceSummary >= SUMMARY_EVERY) showAgreement();
}

/* Drawing */

function view(name) {
  for (const other of ["name", "loading", "done", "trouble", "pair"]) $(`view-${other}`).hidden = other !== name;
  $("actions").hidden = !(name === "pair" || (past.length && (name === "done" || name === "trouble")));
  for (const button of document.querySelectorAll("[data-choice]")) button.disabled = name !== "pair";
  $("undo").disabled = past.length === 0;
  $("progress").hidden = numAll === 0 || name === "name";
  $("who").hidden = !annotator || name === "name";
}

function put(id, text) {
  $(id).textContent = text === "" ? "(empty)" : text;
  $(id).classList.toggle("empty", text === "");
}

function showPair(pair) {
  turn += 1;
  shown = pair;
  showProgress();
  if (!pair) {
    view("done");
    $("done-title").focus();
    showAgreement();
    return;
  }
  put("prompt", pair.prompt);
  put("first", pair.first);
  put("second", pair.second);
  view("pair");
  scrollTo(0, 0);
  prefetch();
}

function showTrouble(error) {
  shown = null;
  const isNew = $("view-trouble").hidden;
  $("trouble-title").textContent = error.isLocked ? "You are not signed in" : error.status ? "The service refused" : "No connection";
  $("trouble-text").textContent = error.isLocked
    ? "The token was not accepted. Reload the page and give it again."
    : error.status
      ? error.message
      : "The service can’t be reached. Your choices are safe in this browser and are sent when it is back.";
  view("trouble");
  if (isNew) $("trouble-title").focus();
  clearTimeout(tryingAgain);
  if (!error.isLocked) tryingAgain = setTimeout(wake, TRY_AGAIN_MS);
}

function showProgress() {
  const num = Math.min(numDone, numAll);
  $("progress").hidden = numAll === 0;
  $("count").textContent = `${num.toLocaleString("en")} of ${numAll.toLocaleString("en")} labelled`;
  $("bar").setAttribute("aria-valuemax", numAll);
  $("bar").setAttribute("aria-valuenow", num);
  $("bar-done").style.width = numAll ? `${(100 * num) / numAll}%` : "0";
  $("undo").disabled = past.length === 0;
}

async function showAgreement() {
  numSinceSummary = 0;
  let summary;
  try {
    summary = await ask("GET", "v1/feedback/summary");
  } catch {
    return; // the summary is optional: other requests report an unreachable service
  }
  const mine = summary.agreement.filter(({ annotators }) => annotators.includes(annotator));
  const num = mine.reduce((sum, { num_pairs }) => sum + num_pairs, 0);
  const same = mine.reduce((sum, { num_pairs, raw }) => sum + num_pairs * raw, 0);
  $("agreement").textContent = num ? `${Math.round((100 * same) / num)}% agreement · ${num} shared` : "";
}

/* The name */

function askName() {
  turn += 1;
  $("name").value = annotator ?? "";
  view("name");
  $("name").focus();
}

function takeName(event) {
  event.preventDefault();
  const name = $("name").value.trim().replace(/\s+/g, " ");
  const isName = name !== "" && !/[\u0000-\u001f\u007f]/.test(name);
  $("name-error").hidden = isName;
  if (!isName) {
    $("name-error").textContent = "Please give a name.";
    $("name").focus();
    return;
  }
  if (name === annotator && shown) {
    view("pair");
    return;
  }
  annotator = name;
  browser.set("annotator", name);
  [shown, upcoming, numAll] = [null, null, 0];
  if (store) recallPast();
  start();
}

function start() {
  $("who").textContent = annotator;
  $("who").setAttribute("aria-label", `You are ${annotator}; change the name`);
  $("agreement").textContent = "";
  showNext();
  showAgreement();
}

/* Events */

function onKey(event) {
  const isTyping = event.target instanceof HTMLInputElement;
  if (event.repeat && event.target instanceof HTMLButtonElement) event.preventDefault();
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || isTyping || $("help").open) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const act = key === "?" ? showHelp : key === "u" ? undo : KEYS[key] ? () => choose(KEYS[key]) : null;
  if (!act || !$("view-name").hidden) return;
  event.preventDefault();
  act();
}

function showHelp() {
  $("help").showModal();
}

function wake() {
  if (document.visibilityState === "hidden") return;
  outbox?.flush();
  if (!$("view-trouble").hidden) showNext();
}

for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => choose(button.dataset.choice));
}
$("undo").addEventListener("click", undo);
$("help-button").addEventListener("click", showHelp);
$("name-form").addEventListener("submit", takeName);
$("who").addEventListener("click", askName);
$("retry").addEventListener("click", wake);
$("look-again").addEventListener("click", showNext);
addEventListener("keydown", onKey);
addEventListener("online", wake);
document.addEventListener("visibilitychange", wake);

if (annotator) start();
else askName();
