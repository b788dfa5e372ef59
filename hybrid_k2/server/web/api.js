// Requests to the server that gave this page, with the key that the reader typed.

import { eventData } from "./sse.js";

const KEY = "hybrid-k2.api-key"; // in sessionStorage: forgotten when the tab is closed
let keyInMemory = "";

/** What went wrong with a request, in the server's words where it said something. `status` 0: it was not reached. */
export class RequestError extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export function apiKey() {
  try {
    return sessionStorage.getItem(KEY) ?? keyInMemory;
  } catch {
    return keyInMemory; // storage is switched off
  }
}

export function setApiKey(key) {
  keyInMemory = key;
  try {
    if (key) sessionStorage.setItem(KEY, key);
    else sessionStorage.removeItem(KEY);
  } catch {
    // it is remembered until the page is left
  }
}

/** Return the JSON of a GET. Throws RequestError. */
export async function getJson(path) {
  return (await send(path, {})).json();
}

/** Say how the server is: {status, progress}, whatever the status code. Throws RequestError if it is not reached. */
export async function health() {
  try {
    return await (await fetch("health", { cache: "no-store" })).json();
  } catch {
    throw unreachable();
  }
}

/** Yield the frames of a streamed chat. Throws RequestError; AbortError when `signal` stops it. */
export async function* streamChat(body, signal) {
  const response = await send("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return;
      const frame = JSON.parse(data);
      if (frame.error) throw new RequestError(200, frame.error.message, frame.error.code);
      yield frame;
    }
  } catch (error) {
    if (error instanceof RequestError || error.name === "AbortError") throw error;
    throw new RequestError(0, "The connection broke before the reply had ended.");
  }
  throw new RequestError(0, "The reply ended before its end mark.");
}

async function send(path, options) {
  const key = apiKey();
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : unreachable();
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const { error } = await response.json().catch(() => ({}));
  const message = error?.message ?? `The server answered with status ${response.status}.`;
  return new RequestError(response.status, message, error?.code ?? null);
}

function unreachable() {
  return new RequestError(0, "The server cannot be reached. Is it still running?");
}
