// Conversations and settings, kept in the browser alone.
//
// A conversation is {id, title, named, updated, messages}; a message has the server's fields (role, content, reasoning,
// toolCalls, toolCallId), images, and what the page shows about it (finish, usage, timings, thinkingMs, error). An image
// is {name, url}: a data URI, or null where there was no room to keep it.

import { IMAGE_URI } from "./images.js";

const CHAT = "hybrid-k2.chat.";
const SETTINGS = "hybrid-k2.settings";
const MAX_CHATS = 100;
const MAX_TITLE = 60;
const NO_ROOM = "This browser has no room to keep the conversation: it is gone when the page is left.";
const NO_ROOM_FOR_IMAGES =
  "This browser has no room to keep the images of the conversation: they are gone when the page is left.";
const ROLES = ["user", "assistant", "tool"];

/** Keep conversations in a Storage: the newest hundred, fewer where there is no room for them. */
export class ChatStore {
  constructor(storage) {
    this._storage = storage; // null: nothing is kept
    this.chats = new Map(); // id -> conversation
    this.complaint = ""; // why the last one could not be kept
    this.reload();
  }

  /** Read what is kept; conversations that are in use stay the objects that they are. */
  reload(inUse = new Set()) {
    const found = new Map();
    for (const key of this._keys()) {
      const chat = readChat(this._get(key), key.slice(CHAT.length));
      if (chat) found.set(chat.id, inUse.has(chat.id) ? this.chats.get(chat.id) : chat);
    }
    for (const id of inUse) if (this.chats.has(id)) found.set(id, this.chats.get(id));
    this.chats = found;
  }

  /** List the conversations, the latest first. */
  latest() {
    return [...this.chats.values()].sort((one, other) => other.updated - one.updated);
  }

  /** Make a conversation, which is kept when it has a message. */
  create() {
    const id = crypto.getRandomValues(new Uint32Array(3)).reduce((text, part) => text + part.toString(36), "");
    return { id, title: "New chat", named: false, updated: Date.now(), messages: [] };
  }

  /** Keep a conversation as it is now: without its images where there is no room, then at the cost of the oldest others. */
  save(chat) {
    this.chats.set(chat.id, chat);
    for (const old of this.latest().slice(MAX_CHATS)) this.remove(old.id);
    this.complaint = "";
    if (this._set(CHAT + chat.id, JSON.stringify(chat))) return;
    const text = JSON.stringify({ ...chat, messages: chat.messages.map(withoutImages) });
    if (chat.messages.some(({ images }) => images?.length)) this.complaint = NO_ROOM_FOR_IMAGES;
    while (!this._set(CHAT + chat.id, text)) {
      const oldest = this.latest().findLast(({ id }) => id !== chat.id && this._get(CHAT + id) !== null);
      if (!oldest) {
        this.complaint = NO_ROOM;
        return;
      }
      this.remove(oldest.id);
    }
  }

  remove(id) {
    this.chats.delete(id);
    try {
      this._storage?.removeItem(CHAT + id);
    } catch {
      // storage was switched off meanwhile
    }
  }

  /** Return the settings as an object of texts and switches; what was kept wrongly is left out. */
  settings() {
    return readObject(this._get(SETTINGS)) ?? {};
  }

  saveSettings(settings) {
    this._set(SETTINGS, JSON.stringify(settings));
  }

  _keys() {
    try {
      const keys = Array.from({ length: this._storage?.length ?? 0 }, (_, index) => this._storage.key(index));
      return keys.filter((key) => key.startsWith(CHAT));
    } catch {
      return [];
    }
  }

  _get(key) {
    try {
      return this._storage?.getItem(key) ?? null;
    } catch {
      return null;
    }
  }

  _set(key, text) {
    try {
      this._storage?.setItem(key, text);
      return this._storage !== null;
    } catch {
      return false;
    }
  }
}

/** Return the browser's storage, or null where it is switched off. */
export function browserStorage() {
  try {
    return window.localStorage;
  } catch {
    return null;
  }
}

/** Name a conversation after its first question, unless the reader named it. */
export function nameChat(chat) {
  const first = chat.messages.find(({ role }) => role === "user");
  const line = (first?.content || first?.images?.[0].name || "").trim().split("\n", 1)[0];
  if (!chat.named && line) chat.title = line.length > MAX_TITLE ? `${line.slice(0, MAX_TITLE - 1).trimEnd()}…` : line;
}

function readChat(text, id) {
  const chat = readObject(text);
  if (!chat || chat.id !== id || typeof chat.title !== "string" || !Number.isFinite(chat.updated)) return null;
  return Array.isArray(chat.messages) && chat.messages.every(isMessage) ? chat : null;
}

function isMessage(message) {
  const { role, content, reasoning = "", toolCalls = [], images = [] } = message ?? {};
  const texts = [content, reasoning].every((text) => typeof text === "string");
  const lists = Array.isArray(toolCalls) && toolCalls.every(isCall) && Array.isArray(images) && images.every(isImage);
  return ROLES.includes(role) && texts && lists;
}

function isImage(image) {
  return typeof image?.name === "string" && (image.url === null || IMAGE_URI.test(image.url));
}

function withoutImages(message) {
  return message.images ? { ...message, images: message.images.map(({ name }) => ({ name, url: null })) } : message;
}

function isCall(call) {
  return [call?.id, call?.name, call?.arguments].every((text) => typeof text === "string");
}

function readObject(text) {
  try {
    const value = JSON.parse(text);
    return value && typeof value === "object" && !Array.isArray(value) ? value : null;
  } catch {
    return null;
  }
}
