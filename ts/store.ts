/** A store: one directory that keeps the caches of many tenants, and hands each only its own. */

import path from 'node:path'
import { invalid } from './errors.js'
import type { Layout, Model } from './model.js'
import {
  guard,
  guardAsync,
  type NativeSessionOptions,
  type NativeStore,
  type NativeStoreStats,
  native,
} from './native.js'
import type { KvDtype, Recipe } from './recipe.js'
import { createSession, type Session } from './session.js'

/** Options of `openStore`. */
export interface StoreOptions {
  /** Directory of the store; made when missing. Several processes may share it. */
  readonly dir: string
  /** Secret of 32 bytes from which tenant keys are derived. Default: a file (mode 0600) made in `dir`. */
  readonly key?: Uint8Array
  /** Largest size of blocks kept in memory, bytes. */
  readonly hostBytes?: number
  /** Largest size of the directory, bytes; the least recently used blocks go first, tails before prefixes. Default: no limit. */
  readonly diskBytes?: number
}

/** Options of `store.open` and `store.resume`. */
export interface SessionOptions {
  /** Who owns the session. Tenants never see each other's rows; there is no default tenant. */
  readonly tenant: string
  /** The model that computes rows. Give either this or `layout`. */
  readonly model?: Model
  /** Shape of the cache, for engines that compute rows themselves. */
  readonly layout?: Layout
  /** Policies in order of effect. Default: none, rows stay as computed. For `resume` it must be the recipe of the session. */
  readonly recipe?: Recipe
  /** How dense rows are kept. Default `f16`. */
  readonly kv?: KvDtype
  /** Tenants that name the same group share the blocks of their sessions with each other, exact ones and those of equal recipes. Default: none. */
  readonly shareGroup?: string
}

/** What the store holds, and has done since it was opened. */
export type StoreStats = NativeStoreStats

/** What `forget` removed. */
export interface Forgotten {
  /** Sessions. */
  readonly records: number
  /** Blocks in files, and the bytes of those files. */
  readonly blocks: number
  readonly bytes: number
  /** Blocks in memory. */
  readonly hostBlocks: number
  readonly hostBytes: number
}

/** An open store. */
export interface Store extends AsyncDisposable {
  /** An empty session. Its first `prefill` takes from the store what the tenant already has. */
  open(options: SessionOptions): Promise<Session>
  /**
   * A committed session, as it was. `session.opened` says what was reused.
   *
   * @throws CacheError `NoSession`, `Mismatch` (another model, dtype or recipe).
   */
  resume(id: string, options: SessionOptions): Promise<Session>
  /** Removes everything of a tenant, from memory and disk. */
  forget(tenant: string): Promise<Forgotten>
  stats(): StoreStats
  /** Waits for work in flight. Open sessions stay usable, but can no longer commit. */
  close(): Promise<void>
}

/** Opens a store. */
export async function openStore(options: StoreOptions): Promise<Store> {
  const { dir, key, hostBytes, diskBytes } = options
  if (typeof dir !== 'string' || dir === '') throw invalid('dir', 'the path of a directory', dir)
  if (key !== undefined && !(key instanceof Uint8Array && key.length === 32))
    throw invalid('key', '32 bytes', key)
  bytes('hostBytes', hostBytes)
  bytes('diskBytes', diskBytes)
  const json = JSON.stringify({
    dir: path.resolve(dir),
    key: key && Buffer.from(key).toString('hex'),
    hostBytes,
    diskBytes,
  })
  const store = await guardAsync(async () => native().openStore(json))
  return createStore(store)
}

function createStore(inner: NativeStore): Store {
  return {
    async open(options) {
      const model = options.model ?? null
      const session = await guardAsync(async () =>
        inner.session(sessionJson(options), model?.native ?? null),
      )
      return createSession(session, model)
    },
    async resume(id, options) {
      if (typeof id !== 'string' || id === '')
        throw invalid('id', 'the id of a committed session', id)
      const model = options.model ?? null
      const session = await guardAsync(async () =>
        inner.resume(id, sessionJson(options), model?.native ?? null),
      )
      return createSession(session, model)
    },
    async forget(tenant) {
      text('tenant', tenant)
      return JSON.parse(await guardAsync(async () => inner.forget(tenant))) as Forgotten
    },
    stats: () => JSON.parse(guard(() => inner.stats())) as StoreStats,
    close: () => guardAsync(async () => inner.close()),
    [Symbol.asyncDispose]() {
      return this.close()
    },
  }
}

function sessionJson(options: SessionOptions): string {
  const { tenant, model, layout, recipe = [], kv = 'f16', shareGroup } = options
  text('tenant', tenant)
  if (shareGroup !== undefined) text('shareGroup', shareGroup)
  if (!model === !layout)
    throw invalid('model', 'either a model or a layout', model ? 'both' : 'neither')
  return JSON.stringify({ tenant, layout, recipe, kv, shareGroup } satisfies Partial<
    Record<keyof NativeSessionOptions, unknown>
  >)
}

function text(field: string, value: unknown): void {
  if (typeof value !== 'string' || value === '')
    throw invalid(field, 'a string that is not empty', value)
}

function bytes(field: string, value: number | undefined): void {
  if (value !== undefined && !(Number.isFinite(value) && value >= 0))
    throw invalid(field, 'bytes, 0 or more', value)
}
