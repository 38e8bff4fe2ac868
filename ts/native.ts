/**
 * The native binding as the facade sees it, and its only importer.
 *
 * Options and reports cross as JSON strings, tensors as typed arrays, everything else as plain numbers and strings.
 * An error thrown or rejected by the binding carries `kvasir-error:{"code","message","details"}` as its message;
 * `guard` and `guardAsync` turn it into a `CacheError`. The binding converts and delegates; it has no logic of its own.
 *
 * @internal
 */

import loader, { type Loaded } from '../binding.cjs'
import { CacheError, fromNative } from './errors.js'

/** Cancels one running call and tells how far it is. Every method is safe at any time. */
export interface NativeCancel {
  /** Ask the work to stop; its promise rejects with code `Cancelled` and nothing of it remains. */
  cancel(): void
  /** Rows done so far by the call this was passed to. */
  done(): number
  /** Rows the call will do in all; 0 until it knows. */
  total(): number
}

/** A loaded model. Calls may run at once; the weights are shared and never change. */
export interface NativeModel {
  /** JSON `NativeModelInfo`. */
  info(): string
  /**
   * JSON. GGUF: `{"format":"gguf","metadata":{key: value}}` with every header key, arrays included (tokenizer lists);
   * 64-bit integers as numbers. Hugging Face folder: `{"format":"hf","config":{…}}`, the content of config.json.
   */
  metadata(): string
  /** JSON `NativeEvalOptions` in, JSON `NativeEvalResult` out. */
  evaluate(ids: Uint32Array, options: string, cancel: NativeCancel): Promise<string>
  /** Let go of the weights once no session uses them. Later calls throw `Closed`. Safe to repeat. */
  close(): void
}

/** Shape of a model's cache, and who it is. */
export interface NativeModelInfo {
  readonly architecture: string
  readonly vocabSize: number
  /** Tokens the model was trained to see at once. */
  readonly context: number
  /** blake3 of hyperparameters and weights, hex. */
  readonly fingerprint: string
  /** Storage of the weight matrices, as in `{"Q4_1": 210, "F32": 61}` (tensors per type). */
  readonly weights: Readonly<Record<string, number>>
  readonly weightBytes: number
  readonly layout: NativeLayout
}

/** JSON form of a layout, in both directions. */
export interface NativeLayout {
  readonly layers: number
  readonly queryHeads: number
  readonly kvHeads: number
  readonly keyDim: number
  readonly valueDim: number
  readonly rope: 'none' | 'half' | 'adjacent'
  /** Inverse frequencies, one per pair; absent for `none`. */
  readonly inverseFrequencies?: readonly number[]
  readonly window?: number
  readonly context: number
  /** 64 hex digits. */
  readonly fingerprint: string
}

/** Options of `NativeModel.evaluate`. */
export interface NativeEvalOptions {
  /** Recipe, as for a session. */
  readonly recipe: unknown
  /** dtype of dense rows in the measured run; the reference is always f32. */
  readonly kv: 'f16' | 'f32' | 'bf16'
  /** Ids per chunk; 0 = all ids as one chunk. */
  readonly chunk: number
  /** Chunks to read, from the start. */
  readonly chunks: number
  /** First ids of each chunk computed dense, then coded; only the rest is measured. 0 = measure everything. */
  readonly prefix: number
  /** Id in front of each chunk, context only; null = none (then the first id of a chunk is not predicted). */
  readonly lead: number | null
  /** Also run the dense f32 reference, which `densePerplexity`, `kl` and `top1` are measured against. */
  readonly reference: boolean
}

/** What `NativeModel.evaluate` measured. */
export interface NativeEvalResult {
  /** Ids that were predicted and counted. */
  readonly tokens: number
  /** Perplexity under the recipe. */
  readonly perplexity: number
  /** Perplexity of the dense f32 cache on the same ids. */
  readonly densePerplexity: number
  /** Mean KL divergence from the dense f32 cache, nats. */
  readonly kl: number
  /** Share of positions where the most likely id is the same, 0 to 1. */
  readonly top1: number
  /** Bytes of the cache per token at the end of a chunk, padding included; mean over chunks. */
  readonly bytesPerToken: number
  /** Tiles under a lossy code, summed over chunks. */
  readonly codedTiles: number
  /** Ops that the quality floor refused, summed over chunks. */
  readonly refused: number
  readonly ms: number
}

/** A store: one directory, one secret, many tenants. */
export interface NativeStore {
  /** Start an empty session. Options: JSON `NativeSessionOptions`; `model` is null for engine builders (then `layout` is set). */
  session(options: string, model: NativeModel | null): Promise<NativeSession>
  /** Bring a committed session back. Its `report().opened` says what was reused. Rejects `NoSession` for an unknown id. */
  resume(id: string, options: string, model: NativeModel | null): Promise<NativeSession>
  /** Remove everything of a tenant: JSON `{records, blocks, bytes, hostBlocks, hostBytes}`. */
  forget(tenant: string): Promise<string>
  /** JSON `NativeStoreStats`. */
  stats(): string
  /** Drains. Later calls reject with `Closed`. Safe to repeat. */
  close(): Promise<void>
}

/** Options of `NativeBinding.openStore`. */
export interface NativeStoreOptions {
  readonly dir: string
  /** 64 hex digits; without it a secret file (mode 0600) is made in `dir`. */
  readonly key?: string
  readonly hostBytes?: number
  readonly diskBytes?: number
}

/** What the store holds and has done since it was opened. */
export interface NativeStoreStats {
  readonly hostBytes: number
  readonly diskBytes: number
  readonly packs: number
  readonly blocks: number
  readonly records: number
  readonly hits: number
  readonly misses: number
  readonly evicted: number
  readonly corrupt: number
}

/** Options of a session. */
export interface NativeSessionOptions {
  readonly tenant: string
  /** Tenants that name the same group share exact blocks. */
  readonly shareGroup?: string
  readonly recipe: unknown
  readonly kv: 'f16' | 'f32' | 'bf16'
  /** Only without a model. */
  readonly layout?: NativeLayout
}

/** One sequence. One writer: while a promise of it is pending, every other mutating call fails with `Busy`. */
export interface NativeSession {
  /** Append ids: take from the store what it has, run the model over the rest. JSON `NativeReport`. */
  prefill(ids: Uint32Array, cancel: NativeCancel): Promise<string>
  /** Append one id and run the model over it. `ContextOverflow` when the context is full. */
  step(id: number, cancel: NativeCancel): Promise<void>
  /** Choose the next id from the logits of the last row; JSON `NativeSampling`. Synchronous; does not change the session. */
  sample(options: string): number
  /** Copy of the logits of the last row, [vocab]. */
  logits(): Float32Array
  /** Ids of the session in order. */
  ids(): Uint32Array
  /** Make the session durable under `id`. JSON `NativeCommit`. */
  commit(id: string): Promise<string>
  /** A second session with the same rows (shared sealed tiles), columns and logits. */
  fork(): Promise<NativeSession>
  /** Start a pass for an engine that runs its own layers: `rows` new rows at the end; `ids` name them for the store (may be empty). */
  pass(rows: number, ids: Uint32Array): NativePass
  /**
   * Append rows of all layers at once. k [L, T, K, Dk] (`NHD`) or [L, K, T, Dk] (`HND`), v likewise, f32, keys not rotated.
   * Options: JSON `{"rows", "layout": "NHD" | "HND", "ids"?: number[]}`. JSON `NativeReport`.
   */
  ingest(k: Float32Array, v: Float32Array, options: string): Promise<string>
  /** JSON `NativeSessionReport`. */
  report(): string
  /** Digest over the rows of all tables as stored, hex: equal digests, equal caches. */
  digest(): Promise<string>
  /** Drains, then frees. Later calls fail with `Closed`. Safe to repeat. */
  close(): Promise<void>
}

/** A pass of a foreign engine. */
export interface NativePass {
  /** Attention of one layer over the cache and the new rows. q, out [rows, H, D]; k, v [rows, K, D]; q and k not rotated. Borrowed for the call. */
  attend(layer: number, q: Float32Array, k: Float32Array, v: Float32Array, out: Float32Array): void
  /** End it: plans run here. JSON `NativeReport`. */
  end(cancel: NativeCancel): Promise<string>
  /** Drop it: the session is as before. */
  discard(): void
}

/** Sampling of one id. */
export interface NativeSampling {
  /** 0 = greedy. */
  readonly temperature: number
  /** 0 = off. */
  readonly topK: number
  /** 1 = off. */
  readonly topP: number
  /** The draw depends on seed and position only, so a replay gives the same id. At most 2^53 - 1. */
  readonly seed: number
}

/** What a prefill or pass really did. */
export interface NativeReport {
  readonly reused: number
  readonly computed: number
  /** Why not more was reused, for people; `complete` after a resume that lacked nothing. */
  readonly why: string
  /** Bytes read from the store. */
  readonly bytes: number
  readonly ms: number
}

/** What a commit really did. */
export interface NativeCommit {
  readonly id: string
  readonly tokens: number
  /** Tokens whose blocks were in the store before. */
  readonly alreadyStored: number
  readonly bytesWritten: number
  /** It survives the death of the process and a power cut. */
  readonly durable: boolean
  readonly ms: number
}

/** State of a session. */
export interface NativeSessionReport {
  readonly tokens: number
  readonly bytesHeld: number
  readonly bytesPerToken: number
  readonly denseTiles: number
  readonly codedTiles: number
  /** How the next rows come to be: `exact`, or the digest of recipe and engine, hex. */
  readonly lineage: string
  /** Why no block of the session is shared, if so. */
  readonly private: string | null
  readonly plans: number
  /** Ops the quality floor refused. */
  readonly refused: number
  /** How the session came to be; null for a fresh one. */
  readonly opened: NativeReport | null
}

/** One registered method. */
export interface NativeMethod {
  readonly slug: string
  readonly paper: string
  readonly group: string
  readonly leaf: string
  readonly track: string
  /** First sentence of the file header. */
  readonly summary: string
  readonly options: readonly NativeOption[]
}

/** One option of a method, as its Rust type declares it. */
export interface NativeOption {
  readonly name: string
  /** `u32`, `f32`, `bool`, `string`, `u32[]`, or `enum(a|b|c)`. */
  readonly type: string
  readonly default: unknown
  readonly doc: string
}

/** Exports of the native file. */
export interface NativeBinding {
  readonly NativeCancel: new () => NativeCancel
  /** Version of the crates: must equal the package's. */
  version(): string
  /** JSON `NativeMethod[]`. */
  methods(): string
  /** JSON `{"backend", "device", "isa", "available": string[], "threads", "os", "arch", "features": string[]}`. */
  backendInfo(): string
  /** `options`: JSON `{"threads"?, "isa"?: "scalar" | "avx2"}`; models with the same options share one pool. */
  loadModel(path: string, options: string, cancel: NativeCancel): Promise<NativeModel>
  /** `options`: JSON `NativeStoreOptions`. */
  openStore(options: string): Promise<NativeStore>
  /** One batch: append `ids[i]` to `sessions[i]`, all of one model. All or nothing. */
  stepMany(sessions: NativeSession[], ids: Uint32Array, cancel: NativeCancel): Promise<void>
  /** `options`: JSON `{"quick": bool, "threads"?}`. JSON `{"isa", "threads", "device", "ceilingGBps", "attention": [{code, headDim, group, tokens, gbps, fractionOfCeiling, ratioToF16}]}`. */
  bench(options: string, cancel: NativeCancel): Promise<string>
}

/** What loading the native file came to, for `doctor`. Never throws. */
export function nativeStatus(): Loaded {
  return loader.load()
}

/** The binding, or `NativeUnavailable` with what was tried. */
export function native(): NativeBinding {
  const found = loader.load()
  if (found.binding) return found.binding as NativeBinding
  const tried = found.tried.map((t) => `  ${t.path}: ${t.why}`).join('\n')
  const name = loader.PACKAGES[found.platform]
  const checkout = found.tried.some((t) => t.path.endsWith('.node') && t.why.includes('npm run'))
  const advice = checkout
    ? 'Build it with `npm run build:native`.'
    : name
      ? `Install it with \`npm install ${name}@${found.version}\` (a package manager may have left out optional dependencies).`
      : `Supported: ${Object.keys(loader.PACKAGES).join(', ')}.`
  throw new CacheError(
    'NativeUnavailable',
    `the native file for ${found.platform} could not be loaded. Tried:\n${tried}\n${advice}`,
    { platform: found.platform, tried: found.tried },
  )
}

/** A synchronous native call. */
export function guard<T>(call: () => T): T {
  try {
    return call()
  } catch (error) {
    throw fromNative(error)
  }
}

/** A native call that returns a promise. */
export async function guardAsync<T>(call: () => Promise<T>): Promise<T> {
  try {
    return await call()
  } catch (error) {
    throw fromNative(error)
  }
}

/** How a long call is watched and stopped. */
export interface Watch {
  /** Aborting it discards the running work; the call rejects with code `Cancelled`. */
  readonly signal?: AbortSignal | undefined
  /** Called about ten times a second with rows done and rows in all. */
  readonly onProgress?: ((done: number, total: number) => void) | undefined
}

/** Runs a native call under a signal and a progress callback. */
export async function watched<T>(
  watch: Watch,
  call: (cancel: NativeCancel) => Promise<T>,
): Promise<T> {
  const { signal, onProgress } = watch
  if (signal?.aborted) throw cancelled(signal)
  const cancel = new (native().NativeCancel)()
  const stop = () => cancel.cancel()
  signal?.addEventListener('abort', stop, { once: true })
  const timer = onProgress && setInterval(() => onProgress(cancel.done(), cancel.total()), 100)
  try {
    return await call(cancel)
  } catch (error) {
    const mapped = fromNative(error)
    throw signal?.aborted && mapped.code === 'Cancelled' ? cancelled(signal) : mapped
  } finally {
    clearInterval(timer)
    signal?.removeEventListener('abort', stop)
  }
}

function cancelled(signal: AbortSignal): CacheError {
  return new CacheError('Cancelled', 'aborted by its signal', {}, signal.reason)
}
