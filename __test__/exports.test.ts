/** What the package exports, in both formats. A change here is a change of the public API. */

import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { expect, it } from 'vitest'
import { path, text } from './data.js'

const require = createRequire(import.meta.url)
const FUNCTIONS = ['CacheError', 'Model', 'backendInfo', 'methods', 'openStore', 'recipe']

it('exports the same names in ESM and CJS', async () => {
  const esm = await import(path('dist/index.js'))
  const cjs = require(path('dist/index.cjs'))
  expect(Object.keys(esm).sort()).toEqual(Object.keys(cjs).sort())
  const policies = Object.keys(await import(path('dist/policies.js')))
  expect(policies).toContain('int8')
  expect(Object.keys(esm).sort()).toEqual([...FUNCTIONS, ...policies].sort())
  expect(Object.keys(require(path('dist/policies.cjs'))).sort()).toEqual(policies.sort())
})

it('needs nothing at run time but Node', () => {
  const manifest = JSON.parse(text('package.json'))
  expect(manifest.dependencies).toBeUndefined()
  for (const file of ['index.js', 'index.cjs', 'cli.js', 'policies.js', 'policies.cjs']) {
    const source = readFileSync(path(`dist/${file}`), 'utf8')
    const names = [
      ...source.matchAll(
        /^(?:import|export)[^'"\n]*from ["']([^"']+)["']|\brequire\(["']([^"']+)["']\)/gm,
      ),
    ]
    const outside = names
      .map((m) => m[1] ?? m[2] ?? '')
      .filter((n) => !n.startsWith('.') && !n.startsWith('node:'))
    const builtin = [
      'fs/promises',
      'fs',
      'path',
      'os',
      'util',
      'url',
      'child_process',
      'readline/promises',
    ]
    expect(outside.filter((n) => !builtin.includes(n))).toEqual([])
  }
})

it('names every bundled package and its licence', () => {
  const manifest = JSON.parse(text('package.json'))
  for (const name of ['@huggingface/jinja', '@huggingface/tokenizers']) {
    expect(text('THIRD-PARTY.md')).toContain(`## ${name} ${manifest.devDependencies[name]}`)
  }
})

it('makes frozen recipes of plain JSON', async () => {
  const { int8, recipe, CacheError } = await import(path('dist/index.js'))
  const r = recipe([int8({ sinkRows: 0, floor: undefined })])
  expect(JSON.parse(JSON.stringify(r))).toEqual([{ use: 'int8', sinkRows: 0 }])
  expect(Object.isFrozen(r) && Object.isFrozen(r[0])).toBe(true)
  expect(() => recipe([{ sinkRows: 1 }])).toThrowError(CacheError)
})
