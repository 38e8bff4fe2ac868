/** The main job through the public API: prefill once, commit, resume, fork, forget, and what bad input meets. */

import { spawnSync } from 'node:child_process'
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import {
  CacheError,
  int8,
  Model,
  openStore,
  recipe,
  type Session,
  type Store,
} from '../ts/index.js'
import { path, root, TINY, TINY_F16, u16 } from './data.js'
import { tempDir } from './temp.js'

const alice = u16('testdata/golden/alice.tok512.u16')
const prompt = Uint32Array.of(1, ...alice.slice(0, 299))

let model: Model
beforeAll(async () => {
  model = await Model.load(TINY)
})
afterAll(() => model.close())

async function next(session: Session, n = 32): Promise<number[]> {
  const ids: number[] = []
  for await (const t of session.generate({ maxTokens: n, stopIds: [] }))
    if (t.id !== null) ids.push(t.id)
  return ids
}

async function withStore(work: (store: Store, dir: string) => Promise<void>): Promise<void> {
  const dir = tempDir()
  const store = await openStore({ dir })
  try {
    await work(store, dir)
  } finally {
    await store.close()
  }
}

const fails = (code: string) => expect.objectContaining({ name: 'CacheError', code })

describe.each([
  ['f16', { kv: 'f16' as const, recipe: [] }],
  ['f32', { kv: 'f32' as const, recipe: [] }],
  ['int8', { kv: 'f16' as const, recipe: recipe([int8()]) }],
])('a committed session, %s', (name, format) => {
  it('comes back in another store object exactly as it was', async () => {
    const dir = tempDir()
    const tenant = 'acme'
    const store = await openStore({ dir })
    const session = await store.open({ tenant, model, ...format })
    expect(await session.prefill(prompt)).toMatchObject({ reused: 0, computed: 300 })
    const commit = await session.commit('conversation-42')
    expect(commit).toMatchObject({ id: 'conversation-42', tokens: 300, durable: true })
    expect(commit.bytesWritten).toBeGreaterThan(0)
    const digest = await session.digest()
    const going = await next(session)
    expect(session.report().codedTiles > 0).toBe(name === 'int8')
    await session.close()
    await store.close()

    const again = await openStore({ dir })
    const resumed = await again.resume('conversation-42', { tenant, model, ...format })
    expect(resumed.opened?.reused).toBeGreaterThan(250)
    expect(resumed.ids).toEqual(prompt)
    expect(await resumed.digest()).toBe(digest)
    expect(await next(resumed)).toEqual(going)
    await resumed.close()
    await again.close()
  })

  it('comes back in another process', async () => {
    await withStore(async (store, dir) => {
      const session = await store.open({ tenant: 'acme', model, ...format })
      await session.prefill(prompt)
      await session.commit('x')
      const digest = await session.digest()
      const going = await next(session)
      await session.close()
      const script = `
        import { Model, openStore } from ${JSON.stringify(path('dist/index.js'))}
        const model = await Model.load(${JSON.stringify(TINY)})
        const store = await openStore({ dir: ${JSON.stringify(dir)} })
        const s = await store.resume('x', { tenant: 'acme', model, ...${JSON.stringify(format)} })
        const digest = await s.digest()
        const ids = []
        for await (const t of s.generate({ maxTokens: 32, stopIds: [] })) ids.push(t.id)
        console.log(JSON.stringify({ digest, ids, reused: s.opened.reused }))
        await s.close(); await store.close(); await model.close()`
      const child = spawnSync(process.execPath, ['--input-type=module', '-e', script], {
        cwd: root,
        encoding: 'utf8',
      })
      expect(child.stderr).toBe('')
      const out = JSON.parse(child.stdout)
      expect(out.reused).toBeGreaterThan(250)
      expect(out).toMatchObject({ digest, ids: going })
    })
  })
})

describe('a store', () => {
  it('shares a prefix between sessions of one tenant while the first still runs, and with no other tenant', async () => {
    await withStore(async (store) => {
      const first = await store.open({ tenant: 'a', model })
      await first.prefill(prompt)
      await first.commit('first')
      const second = await store.open({ tenant: 'a', model })
      const report = await second.prefill(prompt)
      expect(report.reused).toBeGreaterThanOrEqual(192)
      expect(report.reused + report.computed).toBe(300)
      expect(await next(second)).toEqual(await next(first))
      const stranger = await store.open({ tenant: 'b', model })
      expect(await stranger.prefill(prompt)).toMatchObject({ reused: 0, computed: 300 })
      await expect(store.resume('first', { tenant: 'b', model })).rejects.toEqual(
        fails('NoSession'),
      )
    })
  })

  it('shares exact rows inside a group', async () => {
    await withStore(async (store) => {
      const first = await store.open({ tenant: 'a', model, shareGroup: 'g' })
      await first.prefill(prompt)
      await first.commit('first')
      const member = await store.open({ tenant: 'b', model, shareGroup: 'g' })
      expect((await member.prefill(prompt)).reused).toBeGreaterThanOrEqual(192)
      const outsider = await store.open({ tenant: 'c', model, shareGroup: 'h' })
      expect((await outsider.prefill(prompt)).reused).toBe(0)
    })
  })

  it('forgets a tenant and reports it', async () => {
    await withStore(async (store) => {
      const session = await store.open({ tenant: 'a', model })
      await session.prefill(prompt)
      await session.commit('x')
      await session.close()
      const gone = await store.forget('a')
      expect(gone.records).toBe(1)
      expect(gone.blocks).toBeGreaterThan(0)
      expect(gone.bytes).toBeGreaterThan(0)
      await expect(store.resume('x', { tenant: 'a', model })).rejects.toEqual(fails('NoSession'))
      const fresh = await store.open({ tenant: 'a', model })
      expect((await fresh.prefill(prompt)).reused).toBe(0)
    })
  })

  it('tells what it holds', async () => {
    await withStore(async (store) => {
      const session = await store.open({ tenant: 'a', model })
      await session.prefill(prompt)
      await session.commit('x')
      const stats = store.stats()
      expect(stats).toMatchObject({ records: 1, corrupt: 0 })
      expect(stats.blocks).toBeGreaterThanOrEqual(4)
      expect(stats.diskBytes).toBeGreaterThan(0)
    })
  })

  it('makes a secret file that only its owner can read', async () => {
    await withStore(async (_, dir) => {
      const names = spawnSync('find', [dir, '-type', 'f', '-perm', '600'], {
        encoding: 'utf8',
      }).stdout.trim()
      expect(names).not.toBe('')
    })
  })

  it('refuses a resume that does not fit', async () => {
    await withStore(async (store) => {
      const session = await store.open({ tenant: 'a', model })
      await session.prefill(prompt)
      await session.commit('x')
      await expect(store.resume('y', { tenant: 'a', model })).rejects.toEqual(fails('NoSession'))
      await expect(store.resume('x', { tenant: 'a', model, kv: 'f32' })).rejects.toEqual(
        fails('Mismatch'),
      )
      await expect(store.resume('x', { tenant: 'a', model, recipe: [int8()] })).rejects.toEqual(
        fails('Mismatch'),
      )
      const other = await Model.load(TINY_F16)
      await expect(store.resume('x', { tenant: 'a', model: other })).rejects.toEqual(
        fails('Mismatch'),
      )
      await other.close()
    })
  })
})

describe('a session', () => {
  it('forks into two that go their own way', async () => {
    await withStore(async (store) => {
      const a = await store.open({ tenant: 't', model })
      await a.prefill(prompt)
      const b = await a.fork()
      expect(await b.digest()).toBe(await a.digest())
      const going = await next(a)
      await b.prefill([403])
      expect(b.ids.length).toBe(301)
      expect(a.ids.length).toBe(332)
      const c = await store.open({ tenant: 't', model })
      await c.prefill(prompt)
      expect(await next(c)).toEqual(going)
      await Promise.all([a.close(), b.close(), c.close()])
    })
  })

  it('has one writer: a second call in flight is Busy', async () => {
    await withStore(async (store) => {
      const s = await store.open({ tenant: 't', model })
      const first = s.prefill(prompt)
      await expect(s.prefill(prompt)).rejects.toEqual(fails('Busy'))
      await expect(s.commit('x')).rejects.toEqual(fails('Busy'))
      await first
      expect(s.ids.length).toBe(300)
    })
  })

  it('is Closed after close, and close may be repeated', async () => {
    await withStore(async (store) => {
      const s = await store.open({ tenant: 't', model })
      const running = s.prefill(prompt)
      await Promise.all([running, s.close()])
      await s.close()
      await expect(s.prefill([1])).rejects.toEqual(fails('Closed'))
      await expect(s.commit('x')).rejects.toEqual(fails('Closed'))
      expect(() => s.report()).toThrowError(fails('Closed'))
    })
  })

  it('discards the running pass when its signal is aborted', async () => {
    // Slow kernels: the work must still be running when the signal comes.
    const slow = await Model.load(TINY, { isa: 'scalar', threads: 1 })
    const text = Uint32Array.of(1, ...alice.slice(0, 459))
    await withStore(async (store) => {
      const s = await store.open({ tenant: 't', model: slow })
      await s.prefill(text.slice(0, 100))
      const before = await s.digest()
      const stop = new AbortController()
      const pass = s.prefill(text.slice(100), { signal: stop.signal })
      stop.abort(new Error('enough'))
      const error = await pass.catch((e: CacheError) => e)
      expect(error).toMatchObject({
        code: 'Cancelled',
        cause: expect.objectContaining({ message: 'enough' }),
      })
      expect(s.ids.length).toBe(100)
      expect(await s.digest()).toBe(before)
      await s.prefill(text.slice(100))
      const whole = await store.open({ tenant: 'other', model: slow })
      await whole.prefill(text)
      expect(await next(s)).toEqual(await next(whole))
      await expect(s.prefill([1], { signal: AbortSignal.abort() })).rejects.toEqual(
        fails('Cancelled'),
      )
    })
    await slow.close()
  })

  it('ends a generation by signal with every given id in the session', async () => {
    await withStore(async (store) => {
      const s = await store.open({ tenant: 't', model })
      await s.prefill(prompt.slice(0, 8))
      const stop = new AbortController()
      const given: number[] = []
      const run = (async () => {
        for await (const t of s.generate({ signal: stop.signal, stopIds: [] })) {
          if (t.id !== null) given.push(t.id)
          if (given.length === 5) stop.abort()
        }
      })()
      await expect(run).rejects.toEqual(fails('Cancelled'))
      expect([...s.ids.slice(8)]).toEqual(given)
    })
  })

  it('stops at stop strings, stop ids, the limit and the end of the context', async () => {
    await withStore(async (store) => {
      const end = async (options: Parameters<Session['generate']>[0], from = 8) => {
        const s = await store.open({ tenant: 't', model })
        await s.prefill(
          from <= 300 ? prompt.slice(0, from) : Uint32Array.of(1, ...alice.slice(0, from - 1)),
        )
        const g = s.generate(options)
        let text = ''
        let step = await g.next()
        for (; !step.done; step = await g.next()) text += step.value.text
        const { length } = s.ids
        await s.close()
        return { why: step.value, text, length }
      }
      const free = await end({ maxTokens: 40, stopIds: [] })
      expect(free).toMatchObject({ why: 'max-tokens', length: 48 })
      const word = free.text.slice(10, 14)
      const cut = await end({ maxTokens: 40, stopIds: [], stop: [word] })
      expect(cut.why).toBe('stop-string')
      expect(cut.text).toBe(free.text.slice(0, free.text.indexOf(word)))
      const first = await end({ maxTokens: 1, stopIds: [] })
      expect(first.length).toBe(9)
      expect((await end({ stopIds: [] }, 505)).why).toBe('context')
      expect((await end({ stopIds: [] }, 505)).length).toBe(512)
    })
  })

  it('samples the same text from the same seed, and another from another', async () => {
    await withStore(async (store) => {
      const draw = async (seed: number) => {
        const s = await store.open({ tenant: 't', model })
        await s.prefill(prompt.slice(0, 8))
        const ids: number[] = []
        for await (const t of s.generate({
          maxTokens: 24,
          temperature: 1,
          topK: 40,
          topP: 0.95,
          seed,
          stopIds: [],
        })) {
          if (t.id !== null) ids.push(t.id)
        }
        return ids
      }
      expect(await draw(7)).toEqual(await draw(7))
      expect(await draw(7)).not.toEqual(await draw(8))
    })
  })

  it('refuses more than the context, and is unchanged by it', async () => {
    await withStore(async (store) => {
      const s = await store.open({ tenant: 't', model })
      await s.prefill(prompt)
      const before = await s.digest()
      await expect(s.prefill(alice.slice(0, 213))).rejects.toEqual(fails('ContextOverflow'))
      expect(s.ids.length).toBe(300)
      expect(await s.digest()).toBe(before)
      await s.prefill(alice.slice(0, 212))
      await expect(s.step(1)).rejects.toEqual(fails('ContextOverflow'))
    })
  })

  it('steps several sequences in one batch as each alone', async () => {
    await withStore(async (store) => {
      const lengths = [5, 40, 130]
      const open = async (n: number) => {
        const s = await store.open({ tenant: 't', model, kv: 'f32' })
        await s.prefill(prompt.slice(0, n))
        return s
      }
      const alone = await Promise.all(lengths.map(async (n) => next(await open(n), 12)))
      const together = await Promise.all(lengths.map(open))
      const ids: number[][] = lengths.map(() => [])
      for (let i = 0; i < 12; i++) {
        for (const [j, id] of (await model.step(together)).entries()) ids[j]?.push(id)
      }
      expect(ids).toEqual(alone)
    })
  })
})

describe('bad input', () => {
  it('is refused with a code and the field', async () => {
    await expect(openStore({ dir: '' })).rejects.toEqual(fails('InvalidArgument'))
    await expect(openStore({ dir: tempDir(), key: new Uint8Array(3) })).rejects.toEqual(
      fails('InvalidArgument'),
    )
    await withStore(async (store) => {
      const open = (o: object) => store.open({ tenant: 't', model, ...o })
      await expect(open({ tenant: '' })).rejects.toMatchObject({
        code: 'InvalidArgument',
        details: { field: 'tenant' },
      })
      await expect(open({ recipe: [{ use: 'int9' }] })).rejects.toEqual(fails('InvalidArgument'))
      await expect(open({ recipe: [{ use: 'int8', sinkRow: 1 }] })).rejects.toEqual(
        fails('InvalidArgument'),
      )
      await expect(open({ kv: 'f64' })).rejects.toEqual(fails('InvalidArgument'))
      await expect(store.open({ tenant: 't' })).rejects.toEqual(fails('InvalidArgument'))
      const s = await open({})
      expect(() => s.sample()).toThrowError(fails('InvalidState'))
      await expect(s.prefill([])).rejects.toEqual(fails('InvalidArgument'))
      await expect(s.prefill([512])).rejects.toEqual(fails('InvalidArgument'))
      await expect(s.prefill([-1])).rejects.toEqual(fails('InvalidArgument'))
      await expect(s.prefill('text' as unknown as number[])).rejects.toEqual(
        fails('InvalidArgument'),
      )
      await expect(s.commit('')).rejects.toEqual(fails('InvalidArgument'))
      expect(s.ids.length).toBe(0)
    })
  })

  it('in model files is named: missing, truncated, damaged, foreign', async () => {
    await expect(Model.load('/nowhere/model.gguf')).rejects.toEqual(fails('Io'))
    const whole = readFileSync(TINY)
    const dir = tempDir()
    const file = (name: string, bytes: Uint8Array) => {
      writeFileSync(join(dir, name), bytes)
      return join(dir, name)
    }
    await expect(Model.load(file('empty.gguf', new Uint8Array()))).rejects.toEqual(
      fails('Malformed'),
    )
    await expect(Model.load(file('text.gguf', Buffer.from('not a model')))).rejects.toEqual(
      fails('Malformed'),
    )
    for (const n of [20, 4000, whole.length / 2, whole.length - 1]) {
      await expect(
        Model.load(file('short.gguf', whole.subarray(0, n))),
        `${n} bytes`,
      ).rejects.toEqual(fails('Malformed'))
    }
    const foreign = Buffer.from(whole)
    foreign.write('mamba', foreign.indexOf('llama'), 'latin1')
    const error = await Model.load(file('foreign.gguf', foreign)).catch((e: CacheError) => e)
    expect(error).toEqual(fails('Unsupported'))
    expect((error as CacheError).message).toContain('mamba')
    await expect(Model.load(dir)).rejects.toBeInstanceOf(CacheError)
  })
})

describe('an engine that brings its own tensors', () => {
  const layout = {
    layers: 2,
    queryHeads: 4,
    kvHeads: 2,
    keyDim: 8,
    valueDim: 8,
    rope: 'none' as const,
    context: 64,
    fingerprint: '0'.repeat(64),
  }
  const floats = (n: number, f: (i: number) => number) =>
    Float32Array.from({ length: n }, (_, i) => f(i))

  it('gets attention outputs, synchronously, layer by layer', async () => {
    await withStore(async (store) => {
      const s = await store.open({ tenant: 't', layout, kv: 'f32' })
      const pass = s.pass({ rows: 3 })
      const q = floats(3 * 4 * 8, (i) => Math.sin(i))
      const k = floats(3 * 2 * 8, (i) => Math.cos(i))
      const v = floats(3 * 2 * 8, (i) => (i % 17) - 8)
      const out = new Float32Array(3 * 4 * 8)
      for (let layer = 0; layer < 2; layer++) pass.attend({ layer }, q, k, v, out)
      expect(await pass.end()).toMatchObject({ computed: 3, reused: 0 })
      for (let row = 0; row < 3; row++) {
        for (let head = 0; head < 4; head++) {
          const kv = head >> 1
          const scores = Array.from({ length: row + 1 }, (_, t) => {
            let dot = 0
            for (let d = 0; d < 8; d++)
              dot += (q[(row * 4 + head) * 8 + d] ?? 0) * (k[(t * 2 + kv) * 8 + d] ?? 0)
            return Math.exp(dot / Math.sqrt(8))
          })
          const total = scores.reduce((a, b) => a + b)
          for (let d = 0; d < 8; d++) {
            const want = scores.reduce(
              (a, w, t) => a + (w / total) * (v[(t * 2 + kv) * 8 + d] ?? 0),
              0,
            )
            expect(out[(row * 4 + head) * 8 + d]).toBeCloseTo(want, 4)
          }
        }
      }
    })
  })

  it('can drop a pass, and is told about wrong lengths, NaN, foreign dtypes and layers', async () => {
    await withStore(async (store) => {
      const s = await store.open({ tenant: 't', layout, kv: 'f32' })
      const empty = await s.digest()
      const q = floats(4 * 8, () => 1)
      const kv = floats(2 * 8, () => 1)
      const out = new Float32Array(4 * 8)
      const pass = s.pass({ rows: 1 })
      expect(() => s.pass({ rows: 1 })).toThrowError(fails('Busy'))
      expect(() => pass.attend({ layer: 0 }, q.subarray(1), kv, kv, out)).toThrowError(
        fails('InvalidArgument'),
      )
      expect(() => pass.attend({ layer: 0 }, q, kv, kv, out.subarray(1))).toThrowError(
        fails('InvalidArgument'),
      )
      expect(() => pass.attend({ layer: 2 }, q, kv, kv, out)).toThrowError(fails('InvalidArgument'))
      const f64 = new Float64Array(32) as unknown as Float32Array
      expect(() => pass.attend({ layer: 0 }, f64, kv, kv, out)).toThrowError(
        fails('InvalidArgument'),
      )
      expect(() =>
        pass.attend(
          { layer: 0 },
          q,
          floats(16, () => Number.NaN),
          kv,
          out,
        ),
      ).toThrowError(fails('NonFinite'))
      pass.discard()
      expect(await s.digest()).toBe(empty)
    })
  })

  it('takes all layers at once', async () => {
    await withStore(async (store) => {
      const k = floats(2 * 5 * 2 * 8, (i) => Math.cos(i))
      const v = floats(2 * 5 * 2 * 8, (i) => Math.sin(i))
      const a = await store.open({ tenant: 't', layout, kv: 'f32' })
      expect(await a.ingest({ k, v, rows: 5 })).toMatchObject({ computed: 5 })
      const hnd = (x: Float32Array) =>
        floats(x.length, (i) => {
          const d = i % 8
          const t = Math.floor(i / 8) % 5
          const h = Math.floor(i / 40) % 2
          const l = Math.floor(i / 80)
          return x[((l * 5 + t) * 2 + h) * 8 + d] ?? 0
        })
      const b = await store.open({ tenant: 't', layout, kv: 'f32' })
      await b.ingest({ k: hnd(k), v: hnd(v), rows: 5, order: 'HND' })
      expect(await b.digest()).toBe(await a.digest())
      await expect(a.ingest({ k: k.subarray(1), v, rows: 5 })).rejects.toEqual(
        fails('InvalidArgument'),
      )
    })
  })
})

it('a lossy recipe shows its loss: KL above 0, coded tiles above 0', async () => {
  const lossy = await model.evaluate(alice.slice(0, 400), {
    recipe: [int8({ sinkRows: 0 })],
    prefix: 200,
  })
  expect(lossy.kl).toBeGreaterThan(0)
  expect(lossy.codedTiles).toBeGreaterThan(0)
  expect(lossy.top1).toBeGreaterThan(0.9)
  const dense = await model.evaluate(alice.slice(0, 400), { kv: 'f32', prefix: 200 })
  expect(dense).toMatchObject({ codedTiles: 0, top1: 1, tokens: lossy.tokens })
  expect(dense.kl).toBeLessThan(1e-9)
})

it('a text measures as the reference did', async () => {
  // P-CHUNK(512, 1) of alice with id 1 in front, float64: 22.97552.
  const r = await model.evaluate(alice, { kv: 'f32', chunk: 512, chunks: 1, bos: 1 })
  expect(r.tokens).toBe(512)
  expect(r.perplexity).toBeCloseTo(22.97552, 3)
  await expect(model.evaluate(alice, { chunk: 0 })).rejects.toEqual(fails('ContextOverflow'))
})
