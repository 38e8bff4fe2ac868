/** The command line: one JSON value on stdout and nothing else, the fields that are promised, the exit status. */

import { spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { readdirSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, inject, it } from 'vitest'
import { path, TINY, TINY_HF } from './data.js'
import { tempDir } from './temp.js'

function kvasir(...args: string[]) {
  const child = spawnSync(process.execPath, [path('dist/cli.js'), ...args], {
    encoding: 'utf8',
    cwd: tempDir(),
  })
  return { ...child, json: () => JSON.parse(child.stdout) }
}

const smollm = inject('smollm')

describe.each([
  ['the small model', [TINY]],
  ['a Hugging Face folder', [TINY_HF]],
  ...(smollm ? [['SmolLM2', [smollm, '--tokens', '300']] as const] : []),
] as const)('demo on %s', (_, [model, ...more]) => {
  it('resumes in a new process and goes on exactly', () => {
    const run = kvasir('demo', '--model', model, ...more, '--json')
    expect(run.status, run.stderr).toBe(0)
    const out = run.json()
    expect(out).toMatchObject({ model, tokens: expect.any(Number), prefillMs: expect.any(Number) })
    expect(out.recipes.map((r: { recipe: string }) => r.recipe)).toEqual(['f16', 'int8'])
    for (const r of out.recipes) {
      expect(r.identical).toBe(true)
      expect(r.reused).toBeGreaterThan(out.tokens - 64)
      expect(r.reused + r.computed).toBeGreaterThanOrEqual(out.tokens)
      expect(r.resumeMs).toBeGreaterThan(0)
      expect(r.bytesPer1kTokens).toBeGreaterThan(0)
    }
    const [f16, int8] = out.recipes
    expect(f16.kl).toBeLessThan(int8.kl)
    expect(Math.abs(int8.perplexityRatio - 1)).toBeLessThan(0.05)
    expect(run.stderr).toMatch(/a new process resumed it/)
  })
})

it('demo fails when a resume finds nothing in the store', async () => {
  const tmp = tempDir()
  const child = spawn(
    process.execPath,
    [path('dist/cli.js'), 'demo', '--model', TINY, '--tokens', '200', '--json'],
    { env: { ...process.env, TMPDIR: tmp } },
  )
  let [stdout, stderr, removed] = ['', '', 0]
  child.stdout.on('data', (chunk) => {
    stdout += chunk
  })
  child.stderr.on('data', (chunk) => {
    stderr += chunk
    // Between the two processes of a recipe the packs go; the records, which hold the ids, stay.
    if (!/committed/.test(String(chunk))) return
    for (const file of readdirSync(tmp, { recursive: true, encoding: 'utf8' }))
      if (file.endsWith('.pack')) {
        rmSync(join(tmp, file))
        removed += 1
      }
  })
  const [status] = await once(child, 'close')
  expect(removed).toBeGreaterThan(0)
  expect(status, stderr).toBe(1)
  expect(stderr).toMatch(/FAILED, the resume reused nothing/)
  const { recipes } = JSON.parse(stdout)
  expect(recipes[0]).toMatchObject({ reused: 0, computed: 200 })
})

it('demo prints a table', () => {
  const run = kvasir('demo', '--model', TINY)
  expect(run.status, run.stderr).toBe(0)
  expect(run.stdout).toMatch(/recipe.*resume ms.*identical/)
  expect(run.stdout).toMatch(/f16 .* yes/)
})

it('eval measures a recipe on a text', () => {
  const text = path('assets/alice.txt')
  const args = [
    'eval',
    '--model',
    TINY,
    '--text',
    text,
    '--chunk',
    '256',
    '--chunks',
    '2',
    '--json',
  ]
  const dense = kvasir(...args, '--recipe', 'f32').json()
  expect(dense).toMatchObject({ tokens: 512, top1: 1 })
  expect(dense.kl).toBeLessThan(1e-9)
  const coded = kvasir(...args, '--recipe', 'int8:sinkRows=0').json()
  expect(coded.kl).toBeGreaterThan(0)
  expect(coded.bytesPerToken).toBeGreaterThan(0)
  expect(coded.perplexity).toBeGreaterThan(1)
  const prefix = kvasir(...args, '--recipe', 'int8', '--prefix', '128', '--bos', 'none').json()
  expect(prefix.tokens).toBeLessThan(dense.tokens)
})

it('eval refuses a text that is longer than the context', () => {
  const run = kvasir(
    'eval',
    '--model',
    TINY,
    '--text',
    path('assets/alice.txt'),
    '--chunk',
    '0',
    '--json',
  )
  expect(run).toMatchObject({ status: 1, stdout: '' })
  expect(run.stderr).toContain('ContextOverflow')
})

it('methods lists the registry', () => {
  const all = kvasir('methods', '--json').json()
  expect(all.map((m: { slug: string }) => m.slug)).toContain('int8')
  for (const m of all) {
    expect(m).toMatchObject({
      slug: expect.any(String),
      paper: expect.any(String),
      group: expect.any(String),
      leaf: expect.any(String),
      track: expect.any(String),
    })
  }
})

it('doctor says that everything works', () => {
  const run = kvasir('doctor', '--json')
  expect(run.status, run.stderr).toBe(0)
  expect(run.json()).toMatchObject({ ok: true, native: { loaded: true, tried: expect.any(Array) } })
})

it('bench compares attention with the memory of the machine', () => {
  const out = kvasir('bench', '--quick', '--json').json()
  expect(out.ceilingGBps).toBeGreaterThan(0)
  expect(out.attention.length).toBeGreaterThan(1)
  for (const a of out.attention) {
    for (const field of ['headDim', 'group', 'tokens', 'gbps', 'fractionOfCeiling', 'ratioToF16']) {
      expect(a[field], field).toBeGreaterThan(0)
    }
    expect(a.code).toEqual(expect.any(String))
  }
})

it('wrong use is told on stderr with status 2, failures with status 1, and stdout stays empty', () => {
  for (const args of [
    ['demo', '--bogus'],
    ['eval', '--json'],
    ['eval', '--text', 'x', '--chunk', 'many'],
    ['nonsense'],
  ]) {
    expect(kvasir(...args), args.join(' ')).toMatchObject({ status: 2, stdout: '' })
  }
  expect(kvasir('demo', '--model', '/nowhere.gguf', '--json')).toMatchObject({
    status: 1,
    stdout: '',
  })
  expect(kvasir('chat', '--model', TINY, '--json').stderr).toContain('no chat template')
  expect(kvasir('--help').status).toBe(0)
  for (const c of ['demo', 'chat', 'eval', 'methods', 'doctor', 'bench']) {
    expect(kvasir(c, '--help').stdout, c).toContain('--json')
  }
})

it('demo names a text that is too short', () => {
  const file = join(tempDir(), 'short.txt')
  writeFileSync(file, 'too short')
  expect(kvasir('demo', '--model', TINY, '--text', file).stderr).toContain('at least 128 ids')
})

describe.runIf(smollm)('chat with SmolLM2', () => {
  it('goes on after a restart, and computes only what is new', () => {
    const dir = tempDir()
    const say = (text: string) =>
      kvasir(
        'chat',
        '--model',
        smollm as string,
        '--dir',
        dir,
        '--max-tokens',
        '12',
        '--message',
        text,
        '--json',
      ).json()
    const [first] = say('What is the capital of France?')
    expect(first).toMatchObject({ reused: 0, user: 'What is the capital of France?' })
    expect(first.computed).toBeGreaterThan(30)
    expect(first.text).toContain('Paris')
    const [second] = say('And of Italy?')
    expect(second.reused).toBeGreaterThanOrEqual(first.computed)
    expect(second.computed).toBeLessThan(30)
    expect(second.ttftMs).toBeGreaterThan(0)
  })
})
