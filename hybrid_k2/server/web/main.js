// The page as a whole: which view is shown, what the server is doing, and the key when it asks for one.

import { getJson, health, setApiKey } from "./api.js";
import { Attachments } from "./attachments.js";
import { ChatView } from "./chat.js";
import { drawChatList } from "./chat_list.js";
import { askText } from "./dialogs.js";
import { byId, setText } from "./dom.js";
import { formatBytes, formatShare } from "./format.js";
import { Settings } from "./settings.js";
import { StatusView } from "./status.js";
import { browserStorage, ChatStore } from "./store.js";

const WATCH_MS = 1000;

const store = new ChatStore(browserStorage());
const settings = new Settings(store);
const attachments = new Attachments();
const chatView = new ChatView({
  store,
  attachments,
  settings: () => settings.values(),
  askKey,
  changed: drawList,
  failed,
});
const statusView = new StatusView(askKey);
let asking = null; // the question for the key, while it is open
let watching = false; // the server, until it is ready

/** Ask for the key; several parts of the page may need it at once. Returns whether there is one to try. */
function askKey(why) {
  asking ??= askText({
    title: "This server asks for a key",
    note: `${why}. It is kept until this tab is closed.`,
    label: "API key",
    type: "password",
    ok: "Use this key",
  }).then((key) => {
    asking = null;
    if (key) setApiKey(key);
    if (key) showModel();
    return Boolean(key);
  });
  return asking;
}

function drawList() {
  drawChatList({
    chats: store.latest(),
    shown: isStatus() ? null : chatView.chat,
    busy: chatView.busy(),
    rename,
    remove,
  });
  if (!isStatus()) setText(byId("heading"), chatView.chat.title);
  setText(byId("complaint"), store.complaint);
  byId("complaint").hidden = !store.complaint;
}

function rename(chat, title) {
  Object.assign(chat, { title, named: true });
  store.save(chat);
  drawList();
}

function remove(chat) {
  chatView.drop(chat);
  if (chat.id === chatView.chat.id) openChat(store.latest()[0] ?? store.create());
  else drawList();
  byId("new-chat").focus();
}

const isStatus = () => location.hash === "#status";

function openChat(chat) {
  history.replaceState(null, "", `#chat/${chat.id}`);
  chatView.show(chat);
  showView();
}

/** Show what the address names. */
function showView() {
  const status = isStatus();
  const id = location.hash.replace("#chat/", "");
  if (!status && id && id !== chatView.chat.id && store.chats.has(id)) chatView.show(store.chats.get(id));
  byId("chat-view").hidden = status;
  byId("status-view").hidden = !status;
  if (status) byId("to-status").setAttribute("aria-current", "page");
  else byId("to-status").removeAttribute("aria-current");
  if (status) setText(byId("heading"), "Status");
  statusView.run(status);
  drawList();
  openMenu(false);
}

const isMenuOpen = () => document.body.classList.contains("menu-open");

function openMenu(open) {
  document.body.classList.toggle("menu-open", open);
  byId("menu").setAttribute("aria-expanded", String(open));
}

/** Say the model's name, and let images be attached where it reads them; this is also where a server with keys asks for one. */
async function showModel() {
  try {
    const { data } = await getJson("v1/models");
    setText(byId("model"), data[0].id);
    document.title = `${data[0].id} – hybrid-k2`;
    attachments.allow(data[0].supports_image_in === true);
  } catch (error) {
    if (error.status === 401) await askKey(error.message);
  }
}

/** After a failure that has to do with the server's state, tell of that. */
function failed({ status }) {
  if ([0, 503].includes(status) && !watching) watchServer();
}

/** Tell what state the server is in until it is ready. */
async function watchServer() {
  const notice = byId("notice");
  let text = "";
  try {
    const { status, progress } = await health();
    if (status === "loading") text = `The model is loading${progress.total_bytes ? `: ${loaded(progress)}` : " …"}`;
    if (status === "failing") text = "The engine fails at every request; the server's log says why.";
    if (status === "draining") text = "The server is shutting down.";
  } catch (error) {
    text = error.message;
  }
  setText(notice, text);
  notice.hidden = !text;
  if (watching && !text) showModel(); // while it loads, the server cannot tell what the model reads
  watching = Boolean(text);
  if (watching) setTimeout(watchServer, WATCH_MS);
}

const loaded = ({ read_bytes: read, total_bytes: total, share }) =>
  `${formatShare(share)}, ${formatBytes(read)} of ${formatBytes(total)}`;

byId("new-chat").addEventListener("click", () => {
  openChat(store.create());
  byId("input").focus();
});
byId("menu").addEventListener("click", () => openMenu(!isMenuOpen()));
byId("shade").addEventListener("click", () => openMenu(false));
document.addEventListener("keydown", ({ key }) => {
  if (key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (isMenuOpen()) openMenu(false);
  else chatView.stop();
});
addEventListener("hashchange", showView);
addEventListener("storage", () => {
  // Another tab has changed something.
  const { chat } = chatView;
  store.reload(chatView.busy());
  const now = store.chats.get(chat.id);
  if (now && now.updated !== chat.updated) chatView.show(now);
  else if (now) store.chats.set(chat.id, chat);
  drawList();
});

chatView.show(store.chats.get(location.hash.replace("#chat/", "")) ?? store.create());
if (isStatus()) showView();
else openChat(chatView.chat);
showModel();
watchServer();
