// The server, as the page sees it. Owns: the key, and how answers, errors and streams are read.

const KEY = "quire.key";
let key = sessionStorage.getItem(KEY) ?? "";
const listeners = [];

export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const hasKey = () => key !== "";

export function setKey(value) {
  key = value;
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

/** Calls `listener` when the server asks for a key, or for another one. */
export const onLocked = (listener) => listeners.push(listener);

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  const answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  if (answer.ok) return answer;
  if (answer.status === 401) listeners.forEach((listener) => listener());
  let message = `${answer.status} ${answer.statusText}`;
  try {
    message = (await answer.json()).error.message;
  } catch {
    // not ours: a proxy's, say
  }
  throw new ServerError(answer.status, message);
}

/** An answer as JSON. `patience_ms`: after which it is given up. */
export const get = async (path, patience_ms = 15000) =>
  (await request(path, { signal: AbortSignal.timeout(patience_ms) })).json();

/** The events of a streamed answer, as objects. Throws what ends it early. */
export async function* stream(path, body, signal) {
  const answer = await request(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ServerError(0, "the answer was cut off");
      rest += value;
      const frames = rest.split("\n\n");
      rest = frames.pop();
      for (const frame of frames) {
        if (!frame.startsWith("data: ")) continue;
        const data = frame.slice(6);
        if (data === "[DONE]") return;
        const found = JSON.parse(data);
        if (found.error) throw new ServerError(found.error.code ?? 0, found.error.message);
        yield found;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
