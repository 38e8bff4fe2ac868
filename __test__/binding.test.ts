/** What the binding promises beyond arithmetic: states, damage, cancelling, threads, and a free event loop. */

import { readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { Worker } from 'node:worker_threads'
import { afterAll, beforeAll, describe, expect, inject, it } from 'vitest'
import { Model, openStore, type Store } from '../ts/index.js'
import { path, TINY, u16 } from './data.js'
import { tempDir } from './temp.js'

const alice = u16('testdata/golden/alice.tok512.u16')
const prompt = Uint32Array.of(1, ...alice.slice(0, 299))
const fails = (code: string) => expect.objectContaining({ name: 'CacheError', code })

let model: Model
let store: Store
let dir: string
beforeAll(async () => {
  model = await Model.load(TINY)
  dir = tempDir()
  store = await openStore({ dir })
})
afterAll(async () => {
  await store.close()
  await model.close()
})

describe('a session', () => {
  it('is Busy for getters while a call is in flight, and free when it has settled', async () => {
    const s = await store.open({ tenant: 'busy', model })
    const running = s.prefill(prompt)
    expect(() => s.ids).toThrowError(fails('Busy'))
    expect(() => s.report()).toThrowError(fails('Busy'))
    await running
    expect(s.report()).toMatchObject({ tokens: 300, lineage: 'exact', private: null, opened: null })
    await s.close()
  })

  it('tells how far a prefill is', async () => {
    const s = await store.open({ tenant: 'progress', model })
    const seen: [number, number][] = []
    await s.prefill(prompt, { onProgress: (done, total) => seen.push([done, total]) })
    for (const [done, total] of seen) expect(done).toBeLessThanOrEqual(total)
    await s.close()
  })

  it('goes into a batch once, and only with sessions of its model', async () => {
    const other = await Model.load(TINY)
    const a = await store.open({ tenant: 'batch', model })
    const b = await store.open({ tenant: 'batch', model: other })
    for (const s of [a, b]) await s.prefill(prompt.slice(0, 20))
    await expect(model.step([a, a])).rejects.toEqual(fails('InvalidArgument'))
    await expect(model.step([a, b])).rejects.toEqual(fails('InvalidArgument'))
    await expect(model.step([])).rejects.toEqual(fails('InvalidArgument'))
    expect(a.ids.length).toBe(20)
    await other.close()
    expect(() => other.native.info()).toThrow(/"Closed"/)
    // Its session keeps the weights.
    await b.step(5)
    await Promise.all([a.close(), b.close()])
  })

  it('cannot commit into a store that is closed, and goes on without it', async () => {
    const own = await openStore({ dir: tempDir() })
    const s = await own.open({ tenant: 't', model })
    await s.prefill(prompt)
    const commit = s.commit('in flight')
    await own.close()
    expect(await commit).toMatchObject({ durable: true })
    await own.close()
    await expect(s.commit('late')).rejects.toEqual(fails('Closed'))
    await expect(own.open({ tenant: 't', model })).rejects.toEqual(fails('Closed'))
    expect(() => own.stats()).toThrowError(fails('Closed'))
    await s.step(5)
    await s.close()
  })

  it('without a model takes rows but runs nothing', async () => {
    const { inverseFrequencies = [], ...layout } = model.layout
    const s = await store.open({ tenant: 't', layout: { ...layout, inverseFrequencies } })
    await expect(s.prefill([1])).rejects.toEqual(fails('InvalidState'))
    await expect(s.generate().next()).rejects.toEqual(fails('InvalidState'))
    await s.close()
    for (const wrong of [{ layers: 0 }, { kvHeads: 3 }, { keyDim: 7 }, { fingerprint: 'ab' }]) {
      const open = store.open({
        tenant: 't',
        layout: { ...layout, inverseFrequencies, ...wrong },
      })
      await expect(open, JSON.stringify(wrong)).rejects.toEqual(fails('InvalidArgument'))
    }
  })

  it('that takes rows of another engine shares none of them', async () => {
    const s = await store.open({ tenant: 'mixed', model, kv: 'f32' })
    const { layers, kvHeads, keyDim } = model.layout
    const x = new Float32Array(layers * 64 * kvHeads * keyDim).fill(0.5)
    await s.ingest({ k: x, v: x, rows: 64, ids: prompt.slice(0, 64) })
    await s.prefill(prompt.slice(64))
    await s.commit('mixed')
    expect(s.report().private).toBe('rows of another engine')
    const clean = await store.open({ tenant: 'mixed', model, kv: 'f32' })
    expect(await clean.prefill(prompt)).toMatchObject({ reused: 0, computed: 300 })
    const again = await store.resume('mixed', { tenant: 'mixed', model, kv: 'f32' })
    expect(await again.digest()).toBe(await s.digest())
    await Promise.all([s.close(), clean.close(), again.close()])
  })
})

it('copies rows before it returns: their memory may go to somebody else', async () => {
  const heads = { queryHeads: 8, kvHeads: 8, keyDim: 64, valueDim: 64, rope: 'none' as const }
  const layout = { layers: 4, ...heads, context: 1024, fingerprint: '0'.repeat(64) }
  const rows = 512
  const x = () => Float32Array.from({ length: 4 * rows * 8 * 64 }, (_, i) => Math.sin(i))
  const [k, v] = [x(), x()]
  const a = await store.open({ tenant: 'rows', layout })
  await a.ingest({ k, v, rows })
  const b = await store.open({ tenant: 'rows', layout })
  const running = b.ingest({ k, v, rows })
  for (const array of [k, v]) structuredClone(array, { transfer: [array.buffer] }).fill(7)
  await running
  expect(await b.digest()).toBe(await a.digest())
  await Promise.all([a.close(), b.close()])
})

it('a pass that was dropped leaves the session as it was', async () => {
  const s = await store.open({ tenant: 'dropped', model })
  s.pass({ rows: 3 }).discard()
  expect(s.report().private).toBeNull()
  expect(() => s.pass({ rows: 2 ** 32 - 1 })).toThrowError(fails('ContextOverflow'))
  await s.prefill(prompt)
  expect(s.report().private).toBeNull()
  await s.close()
})

it('a damaged file costs time and never truth', async () => {
  const own = tempDir()
  const first = await openStore({ dir: own })
  const s = await first.open({ tenant: 't', model, kv: 'f32' })
  await s.prefill(prompt)
  await s.commit('x')
  const next = s.sample()
  await s.close()
  await first.close()
  const files = readdirSync(own, { recursive: true, withFileTypes: true })
    .filter((f) => f.isFile())
    .map((f) => join(f.parentPath, f.name))
    .sort((a, b) => statSync(b).size - statSync(a).size)
  const largest = files[0] as string
  const bytes = readFileSync(largest)
  const middle = bytes.length >> 1
  bytes[middle] = (bytes[middle] ?? 0) ^ 0xff
  writeFileSync(largest, bytes)
  const second = await openStore({ dir: own })
  const r = await second.resume('x', { tenant: 't', model, kv: 'f32' })
  expect(r.opened?.reused).toBeLessThan(300)
  expect(r.opened?.computed).toBe(300 - (r.opened?.reused ?? 0))
  expect(r.opened?.why).toMatch(/checksum/)
  expect(second.stats().corrupt).toBeGreaterThan(0)
  expect(r.ids).toEqual(prompt)
  expect(r.sample()).toBe(next)
  await r.close()
  await second.close()
})

it('worker threads use it at once, and may be terminated in the middle of a call', async () => {
  const script = `
    import { parentPort } from 'node:worker_threads'
    import { Model, openStore } from ${JSON.stringify(path('dist/index.js'))}
    const model = await Model.load(${JSON.stringify(TINY)})
    const store = await openStore({ dir: ${JSON.stringify(dir)} })
    const s = await store.open({ tenant: 'w', model })
    await s.prefill(${JSON.stringify([...prompt])})
    parentPort.postMessage(s.sample())
    for (;;) await (await s.fork()).prefill([5, 6, 7, 8])`
  const file = join(tempDir(), 'worker.mjs')
  writeFileSync(file, script)
  const start = () => new Worker(file)
  const workers = [start(), start()]
  const chosen = workers.map(
    (w) => new Promise((resolve, reject) => w.once('message', resolve).once('error', reject)),
  )
  const [a, b] = await Promise.all(chosen)
  expect(a).toBe(b)
  await Promise.all(workers.map((w) => w.terminate()))
  const s = await store.open({ tenant: 'w', model })
  await s.prefill(prompt)
  expect(s.sample()).toBe(a)
  await s.close()
})

const smollm = inject('smollm')
it.runIf(smollm)('a load can be cancelled', async () => {
  const stop = new AbortController()
  const load = Model.load(smollm as string, { signal: stop.signal })
  stop.abort()
  await expect(load).rejects.toEqual(fails('Cancelled'))
})

it.runIf(smollm)('a long prefill leaves the event loop free', async () => {
  const real = await Model.load(smollm as string)
  const s = await store.open({ tenant: 'loop', model: real })
  const delay = monitorEventLoopDelay({ resolution: 5 })
  delay.enable()
  const ids = Uint32Array.from({ length: 256 }, (_, i) => 1000 + i)
  await s.prefill(ids)
  await s.commit('loop')
  delay.disable()
  // The machine of a test may be loaded: a pass that ran on this thread would take many times as long.
  expect(delay.max / 1e6).toBeLessThan(150)
  await s.close()
  await real.close()
})
