/** A session: one sequence and its cache, owned by one tenant, with one writer at a time. */

import { CacheError, invalid } from './errors.js'
import type { Model } from './model.js'
import {
  guard,
  guardAsync,
  type NativeCommit,
  type NativeReport,
  type NativeSession,
  type NativeSessionReport,
  type Watch,
  watched,
} from './native.js'
import { type SamplingOptions, samplingJson } from './sampling.js'

/** What a prefill, pass or resume really did. */
export type Report = NativeReport

/** What a commit really did. */
export type CommitReport = NativeCommit

/** State of a session. */
export type SessionReport = NativeSessionReport

/** Stops and watches a long call. */
export interface WatchOptions {
  /** Aborting it discards the running pass; the session is as before the call. */
  readonly signal?: AbortSignal
  /** Called about ten times a second with rows done and rows in all. */
  readonly onProgress?: (done: number, total: number) => void
}

/** Options of `generate`. */
export interface GenerateOptions extends SamplingOptions {
  /** Most ids to generate. Default: until a stop or the end of the context. */
  readonly maxTokens?: number
  /** Ids that end the text. Default: those of the model. `[]` for none. They are not part of the text or the session. */
  readonly stopIds?: readonly number[]
  /** Strings that end the text. They are left out of it; the ids that spelled them stay in the session. */
  readonly stop?: readonly string[]
  /** Aborting it discards the running pass; the loop throws `Cancelled` and every id it gave out is in the session. */
  readonly signal?: AbortSignal
}

/** One step of `generate`. */
export interface Token {
  /** The id, now part of the session; null for text that was held back and comes alone at the end. */
  readonly id: number | null
  /** Text that became whole with this id; held back while it may still be part of a character or a stop string. */
  readonly text: string
}

/** How a generation ended. */
export type FinishReason = 'stop-id' | 'stop-string' | 'max-tokens' | 'context'

/** Tokens as they come; `return` value of the generator says why it ended. */
export type Generation = AsyncGenerator<Token, FinishReason, undefined>

/** A pass of an engine that runs its own layers. */
export interface Pass {
  /**
   * Attention of one layer over the cache and the new rows. Synchronous, on borrowed views.
   * q and out [rows, H, D], k [rows, K, Dk], v [rows, K, Dv], f32; q and k before RoPE.
   */
  attend(
    at: { readonly layer: number },
    q: Float32Array,
    k: Float32Array,
    v: Float32Array,
    out: Float32Array,
  ): void
  /** Ends it; the only place where plans run. */
  end(options?: WatchOptions): Promise<Report>
  /** Drops it: the session is as before. */
  discard(): void
}

/** All layers of some rows, for engines that only hand over results. */
export interface Rows {
  /** [L, T, K, Dk] (`NHD`) or [L, K, T, Dk] (`HND`), before RoPE. Copied before `ingest` returns. */
  readonly k: Float32Array
  /** As k, with Dv. */
  readonly v: Float32Array
  /** T. */
  readonly rows: number
  readonly order?: 'NHD' | 'HND'
  /** Ids of the rows; without them the session cannot share blocks. */
  readonly ids?: Uint32Array | readonly number[]
}

/** A session. Every method but the getters fails with `Busy` while a call is in flight, and with `Closed` after `close`. */
export interface Session extends AsyncDisposable {
  /** How a resumed session came to be; null for a fresh one. */
  readonly opened: Report | null
  /** Ids in order. */
  readonly ids: Uint32Array
  /** Appends ids: takes from the store what it has, runs the model over the rest. */
  prefill(ids: Uint32Array | readonly number[], options?: WatchOptions): Promise<Report>
  /** Continues the text. Every id it yields is already in the session. */
  generate(options?: GenerateOptions): Generation
  /** Appends one id. `ContextOverflow` when the context is full. */
  step(id: number, options?: WatchOptions): Promise<void>
  /** The id that would come next. Does not change the session. */
  sample(options?: SamplingOptions): number
  /** Logits behind the last id, [vocab]. */
  logits(): Float32Array
  /** Makes the session durable under an id: when this resolves, it survives the death of the process. */
  commit(id: string): Promise<CommitReport>
  /** A second session that shares the rows so far and then goes its own way. */
  fork(): Promise<Session>
  /** Starts a pass of `rows` new rows. */
  pass(options: { readonly rows: number; readonly ids?: Uint32Array | readonly number[] }): Pass
  /** Appends rows that an engine computed. */
  ingest(rows: Rows): Promise<Report>
  /** What the session holds, and what its policies did. */
  report(): SessionReport
  /** Digest over all stored rows, hex: equal digests, equal caches. */
  digest(): Promise<string>
  /** Waits for the call in flight, then frees. */
  close(): Promise<void>
}

const inner = new WeakMap<Session, NativeSession>()

/** The binding's side of a session. @internal */
export function nativeOf(session: Session): NativeSession {
  const found = inner.get(session)
  if (!found) throw invalid('session', 'a session of this package', session)
  return found
}

/** Ids as the binding takes them. @internal */
export function toIds(field: string, ids: Uint32Array | readonly number[]): Uint32Array {
  if (ids instanceof Uint32Array) return ids
  if (!Array.isArray(ids)) throw invalid(field, 'a Uint32Array or a list of ids', ids)
  for (const [i, id] of ids.entries()) {
    if (!Number.isInteger(id) || id < 0 || id > 0xffff_ffff)
      throw invalid(`${field}[${i}]`, 'an id', id)
  }
  return Uint32Array.from(ids)
}

/** @internal */
export function createSession(native: NativeSession, model: Model | null): Session {
  const session: Session = {
    get opened() {
      return session.report().opened
    },
    get ids() {
      return guard(() => native.ids())
    },
    async prefill(ids, options = {}) {
      const list = toIds('ids', ids)
      return JSON.parse(
        await watched(watch(options), (cancel) => native.prefill(list, cancel)),
      ) as Report
    },
    generate: (options = {}) => generate(native, model, options),
    async step(id, options = {}) {
      const [one] = toIds('id', [id])
      await watched(watch(options), (cancel) => native.step(one as number, cancel))
    },
    sample(options = {}) {
      const json = samplingJson(options)
      return guard(() => native.sample(json))
    },
    logits: () => guard(() => native.logits()),
    async commit(id) {
      if (typeof id !== 'string' || id === '') throw invalid('id', 'a string that is not empty', id)
      return JSON.parse(await guardAsync(async () => native.commit(id))) as CommitReport
    },
    async fork() {
      return createSession(await guardAsync(async () => native.fork()), model)
    },
    pass({ rows, ids = [] }) {
      if (!Number.isInteger(rows) || rows < 1)
        throw invalid('rows', 'a whole number of 1 or more', rows)
      const list = toIds('ids', ids)
      const pass = guard(() => native.pass(rows, list))
      return {
        attend(at, q, k, v, out) {
          // One try per layer and token: `guard` would add a closure to the hottest call of the package.
          try {
            pass.attend(at.layer, q, k, v, out)
          } catch (error) {
            guard(() => {
              throw error
            })
          }
        },
        end: async (options = {}) =>
          JSON.parse(await watched(watch(options), (cancel) => pass.end(cancel))) as Report,
        discard: () => guard(() => pass.discard()),
      }
    },
    async ingest({ k, v, rows, order = 'NHD', ids }) {
      if (!Number.isInteger(rows) || rows < 1)
        throw invalid('rows', 'a whole number of 1 or more', rows)
      const options = JSON.stringify({ rows, layout: order, ids: ids && [...toIds('ids', ids)] })
      return JSON.parse(await guardAsync(async () => native.ingest(k, v, options))) as Report
    },
    report: () => JSON.parse(guard(() => native.report())) as SessionReport,
    digest: () => guardAsync(async () => native.digest()),
    close: () => guardAsync(async () => native.close()),
    [Symbol.asyncDispose]: () => session.close(),
  }
  inner.set(session, native)
  return session
}

function watch(options: WatchOptions): Watch {
  return { signal: options.signal, onProgress: options.onProgress }
}

async function* generate(
  session: NativeSession,
  model: Model | null,
  options: GenerateOptions,
): Generation {
  if (!model)
    throw new CacheError('InvalidState', 'generate: this session has a layout and no model to run')
  const {
    maxTokens = Number.POSITIVE_INFINITY,
    stop = [],
    stopIds = model.tokenizer.stopIds,
    signal,
  } = options
  if (!(maxTokens >= 0)) throw invalid('maxTokens', 'a number of 0 or more', maxTokens)
  if (stop.some((s) => typeof s !== 'string' || s === ''))
    throw invalid('stop', 'strings that are not empty', stop)
  const sampling = samplingJson(options)
  const text = stopText(stop)
  const decoder = model.tokenizer.decoder()
  for (let n = 0; n < maxTokens; n++) {
    const id = guard(() => session.sample(sampling))
    if (stopIds.includes(id)) {
      const rest = text.rest() + decoder.flush()
      if (rest) yield { id: null, text: rest }
      return 'stop-id'
    }
    try {
      await watched({ signal }, (cancel) => session.step(id, cancel))
    } catch (error) {
      if ((error as CacheError).code === 'ContextOverflow') {
        const rest = text.rest() + decoder.flush()
        if (rest) yield { id: null, text: rest }
        return 'context'
      }
      throw error
    }
    const out = text.push(decoder.push(id))
    if (out.hit || n + 1 === maxTokens) {
      const tail = out.hit ? '' : text.rest() + decoder.flush()
      yield { id, text: out.text + tail }
      return out.hit ? 'stop-string' : 'max-tokens'
    }
    yield { id, text: out.text }
  }
  return 'max-tokens'
}

/** Passes text on, but holds back an end that may become a stop string. @internal */
export function stopText(stops: readonly string[]): {
  push(text: string): { readonly text: string; readonly hit: boolean }
  rest(): string
} {
  let held = ''
  return {
    push(text) {
      held += text
      const hits = stops.map((s) => held.indexOf(s)).filter((i) => i >= 0)
      if (hits.length > 0) {
        const out = held.slice(0, Math.min(...hits))
        held = ''
        return { text: out, hit: true }
      }
      let keep = 0
      for (const s of stops) {
        for (let n = Math.min(s.length - 1, held.length); n > keep; n--) {
          if (s.startsWith(held.slice(held.length - n))) keep = n
        }
      }
      const out = held.slice(0, held.length - keep)
      held = held.slice(held.length - keep)
      return { text: out, hit: false }
    },
    rest() {
      const out = held
      held = ''
      return out
    },
  }
}
