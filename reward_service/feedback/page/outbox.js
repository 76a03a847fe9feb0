// Requests in transit to the service: every choice is stored in the browser before it is sent and removed after the
// service has acknowledged it, so that none is lost and, because of its id, none counts twice.

const FIRST_WAIT_MS = 1000;
const LONGEST_WAIT_MS = 15000;

/** Storage that outlives the page, or memory if the browser does not allow storage. */
export class Shelf {
  constructor(prefix) {
    this.prefix = prefix;
    this.memory = new Map();
    this.isDurable = true;
  }

  get(key) {
    const name = this.prefix + key;
    if (this.memory.has(name)) return this.memory.get(name);
    try {
      return JSON.parse(localStorage.getItem(name));
    } catch {
      return null;
    }
  }

  set(key, value) {
    const name = this.prefix + key;
    try {
      localStorage.setItem(name, JSON.stringify(value));
      this.memory.delete(name);
    } catch {
      this.memory.set(name, value);
      this.isDurable = false;
    }
  }

  remove(key) {
    this.memory.delete(this.prefix + key);
    try {
      localStorage.removeItem(this.prefix + key);
    } catch {
      this.isDurable = false;
    }
  }

  keys() {
    const names = new Set(this.memory.keys());
    try {
      for (let i = 0; i < localStorage.length; i++) names.add(localStorage.key(i));
    } catch {
      this.isDurable = false;
    }
    return [...names]
      .filter((name) => name.startsWith(this.prefix))
      .map((name) => name.slice(this.prefix.length))
      .sort();
  }
}

/** A failed request: `status` is the HTTP status, 0 if the service was not reached. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }

  /** Whether the service rejected the token. */
  get isLocked() {
    return [401, 403].includes(this.status);
  }

  /** Whether a retry may succeed: not reached, not signed in, too busy, or failing. */
  get isPassing() {
    return this.status === 0 || this.isLocked || [408, 425, 429].includes(this.status) || this.status >= 500;
  }
}

/** Sends requests in order, one at a time, with retries; calls `changed` after every change. */
export class Outbox {
  constructor(shelf, send, { changed, refused }) {
    this.shelf = shelf;
    this.send = send;
    this.changed = changed;
    this.refused = refused;
    this.failure = null;
    this.running = null;
    this.timer = null;
    this.waitMs = FIRST_WAIT_MS;
    this.counter = 0;
    this.isStopped = false;
  }

  /** Stop sending: the service has another store now. Waiting requests stay stored until their own store is back. */
  stop() {
    clearTimeout(this.timer);
    this.isStopped = true;
  }

  /** Store a request `{method, path, body}` and send it when it is next. */
  put(request) {
    this.counter += 1;
    const order = String(Date.now()).padStart(15, "0") + "-" + String(this.counter).padStart(6, "0");
    this.shelf.set(order, request);
    this.flush();
  }

  waiting() {
    return this.shelf
      .keys()
      .map((key) => this.shelf.get(key))
      .filter(Boolean);
  }

  /** Send the waiting requests now; the promise resolves when no more can be sent. */
  flush() {
    clearTimeout(this.timer);
    this.timer = null;
    this.running ??= this.#sendAll().finally(() => {
      this.running = null;
      this.changed();
    });
    return this.running;
  }

  async #sendAll() {
    for (let key = this.shelf.keys()[0]; key !== undefined && !this.isStopped; key = this.shelf.keys()[0]) {
      const request = this.shelf.get(key);
      try {
        if (request) await this.send(request);
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
        if (error.isPassing) {
          this.#tryLater(error);
          return;
        }
        this.refused(request, error);
      }
      this.shelf.remove(key);
      this.failure = null;
      this.waitMs = FIRST_WAIT_MS;
      this.changed();
    }
  }

  /** Retry later, with a growing delay; do not retry until the user has signed in, if that is what failed. */
  #tryLater(error) {
    this.failure = error;
    if (error.isLocked || this.isStopped) return;
    this.timer = setTimeout(() => this.flush(), this.waitMs);
    this.waitMs = Math.min(2 * this.waitMs, LONGEST_WAIT_MS);
  }
}
