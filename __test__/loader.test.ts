/** Finding the native file: what is tried, and what is said when nothing fits. Each case runs in a process of its own. */

import { spawnSync } from 'node:child_process'
import { cpSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import { path } from './data.js'

const dir = mkdtempSync(join(tmpdir(), 'kvasir-loader-'))
const home = join(dir, 'kvasir')

beforeAll(() => {
  mkdirSync(home)
  for (const f of ['binding.cjs', 'package.json', 'dist']) {
    cpSync(path(f), join(home, f), { recursive: true })
  }
})
afterAll(() => rmSync(dir, { recursive: true, force: true }))

function node(args: string[], env: Record<string, string> = {}) {
  return spawnSync(process.execPath, args, {
    cwd: home,
    encoding: 'utf8',
    env: { ...process.env, KVASIR_NATIVE_PATH: '', ...env },
  })
}

const firstUse = `openStore({ dir: 'x' }).catch((e) => console.log(JSON.stringify({ name: e.name, code: e.code, message: e.message, details: e.details })))`

describe.each([
  [
    'ESM',
    ['--input-type=module', '-e', `import { openStore } from './dist/index.js'; ${firstUse}`],
  ],
  ['CJS', ['-e', `const { openStore } = require('./dist/index.cjs'); ${firstUse}`]],
])('%s without a native file', (_, args) => {
  it('imports, and the first use says NativeUnavailable with what was tried', () => {
    const { stdout, stderr, status } = node(args)
    expect({ stderr, status }).toEqual({ stderr: '', status: 0 })
    const error = JSON.parse(stdout)
    expect(error).toMatchObject({ name: 'CacheError', code: 'NativeUnavailable' })
    expect(error.details.tried).toHaveLength(1)
    expect(error.message).toContain(error.details.platform)
    expect(error.message).toMatch(/kvasir-[a-z0-9-]+: not installed/)
    expect(error.message).toMatch(/npm install kvasir-[a-z0-9-]+@\d/)
  })

  it('tries nothing else when KVASIR_NATIVE_PATH is set', () => {
    const error = JSON.parse(node(args, { KVASIR_NATIVE_PATH: '/nowhere/kvasir.node' }).stdout)
    expect(error.details.tried).toEqual([{ path: '/nowhere/kvasir.node', why: 'no such file' }])
  })

  it('says why a file that is there does not load', () => {
    const file = join(dir, 'text.node')
    writeFileSync(file, 'not a library')
    const error = JSON.parse(node(args, { KVASIR_NATIVE_PATH: file }).stdout)
    expect(error.details.tried[0].path).toBe(file)
    expect(error.details.tried[0].why).not.toMatch(/not installed|no such file/)
  })
})

it('does not take a native file from beside the installed package', () => {
  mkdirSync(join(home, 'native'), { recursive: true })
  writeFileSync(join(home, 'native', 'kvasir.node'), 'a stray file')
  const out = node(['-p', `JSON.stringify(require('./binding.cjs').load().tried)`]).stdout
  expect(out).not.toContain('native/kvasir.node')
})

it('refuses a platform package of another version', () => {
  const name = node([
    '-p',
    `const b = require('./binding.cjs'); b.PACKAGES[b.load().platform]`,
  ]).stdout.trim()
  const other = join(home, 'node_modules', name)
  mkdirSync(other, { recursive: true })
  // A stand-in with the right name: what counts here is the answer of version().
  writeFileSync(join(other, 'package.json'), JSON.stringify({ name, version: '9.9.9' }))
  writeFileSync(join(other, 'kvasir.node'), '')
  const hook = `require.extensions['.node'] = (m) => { m.exports = { version: () => '9.9.9' } }`
  const out = node(['-e', `${hook}; console.log(JSON.stringify(require('./binding.cjs').load()))`])
  const { tried, binding } = JSON.parse(out.stdout)
  expect(binding).toBeNull()
  expect(tried[0].why).toBe('its version is 9.9.9, this package is 0.1.0')
})

it('doctor explains without a native file', () => {
  rmSync(join(home, 'node_modules'), { recursive: true, force: true })
  const { stdout, status } = node(['dist/cli.js', 'doctor', '--json'])
  expect(status).toBe(1)
  const report = JSON.parse(stdout)
  expect(report).toMatchObject({ ok: false, native: { loaded: false, path: null } })
  expect(report.native.tried[0].why).toBe('not installed')
})
