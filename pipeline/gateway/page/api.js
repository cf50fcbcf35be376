// The server: its API and its figures, asked with the key that this tab was given.
//
// The key is kept in sessionStorage alone, which is this tab's and ends with it: never in an address,
// which logs and histories keep, nor in localStorage or a cookie, which outlive the tab.

const KEY = "veilpipe-key";
const CUT = "The connection ended before the answer did.";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }

  get wantsKey() {
    return this.status === 401;
  }
}

export async function ask(path, { body, signal } = {}) {
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      body: body && JSON.stringify(body),
      headers,
      signal,
      cache: "no-store",
      credentials: "omit",
      redirect: "error", // whoever it leads to would get the key
    });
  } catch (error) {
    throw lost(error, "The server cannot be reached.");
  }
  if (response.ok) return response;
  throw new ServerError(response.status, await reason(response));
}

// What fetch fails with: our own wish to stop, or else the network.
const lost = (error, message) => (error.name === "AbortError" ? error : new ServerError(0, message));

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answers ${response.status}.`;
  }
}

// The JSON objects of a stream of server-sent events, as they come; ends before `[DONE]`.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => Promise.reject(lost(error, CUT)));
    if (done) throw new ServerError(0, CUT);
    held += value;
    const whole = held.split("\n\n");
    held = whole.pop();
    for (const event of whole) {
      const data = event.replace(/^data: ?/, "");
      if (data === "[DONE]") return;
      const found = JSON.parse(data);
      if (found.error) throw new ServerError(0, found.error.message);
      yield found;
    }
  }
}
