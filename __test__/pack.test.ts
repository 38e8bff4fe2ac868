/** What users install: both tarballs in an empty folder, with no compiler in the path. */

import { spawnSync } from 'node:child_process'
import {
  existsSync,
  mkdirSync,
  readFileSync,
  realpathSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { delimiter, dirname, join } from 'node:path'
import { beforeAll, expect, it } from 'vitest'
import { path, TINY } from './data.js'
import { tempDir } from './temp.js'

const work = tempDir()
let tarballs: { main: string; platform: string }
let platform: string

/** npm's own script: its launcher needs a shell in the path. */
function npmCli(): string {
  const dirs = (process.env['PATH'] ?? '').split(delimiter)
  const found = dirs.map((d) => join(d, 'npm')).find(existsSync)
  if (!found) throw new Error('npm is not in the path')
  const real = realpathSync(found)
  return real.endsWith('.js') ? real : join(dirname(real), '../lib/node_modules/npm/bin/npm-cli.js')
}

/** A path that holds node and nothing else. */
function bareEnv(): NodeJS.ProcessEnv {
  const bin = join(work, 'bin')
  if (!existsSync(bin)) {
    mkdirSync(bin)
    symlinkSync(process.execPath, join(bin, 'node'))
  }
  return { PATH: bin, HOME: work, npm_config_cache: join(work, 'npm-cache') }
}

function install(name: string, ...files: string[]): string {
  const dir = join(work, name)
  mkdirSync(dir)
  writeFileSync(join(dir, 'package.json'), '{ "private": true }')
  // Packages for other platforms are not published while this runs; leaving them out is what npm does on its own for a wrong platform.
  const args = [
    npmCli(),
    'install',
    '--offline',
    '--no-audit',
    '--no-fund',
    '--omit=optional',
    ...files,
  ]
  const done = spawnSync(process.execPath, args, { cwd: dir, encoding: 'utf8', env: bareEnv() })
  expect(done.status, done.stderr).toBe(0)
  return dir
}

function node(cwd: string, ...args: string[]) {
  return spawnSync(process.execPath, args, { cwd, encoding: 'utf8', env: bareEnv() })
}

const BODY = `
  const model = await Model.load(${JSON.stringify(TINY)})
  const store = await openStore({ dir: './kv' })
  const ids = await model.tokenizer.encode('Once upon a time there was a little dog. '.repeat(20))
  const options = { tenant: 't', model, recipe: recipe([int8()]) }
  const s = await store.open(options)
  await s.prefill(ids)
  await s.commit('x')
  const r = await store.resume('x', options)
  const shared = process.report.getReport().sharedObjects.filter((f) => f.endsWith('.node'))
  console.log(JSON.stringify({ reused: r.opened.reused, same: (await r.digest()) === (await s.digest()), shared }))
  await r.close(); await s.close(); await store.close(); await model.close()`
const NAMES = '{ Model, int8, openStore, recipe }'

beforeAll(() => {
  const done = spawnSync(
    process.execPath,
    [path('scripts/pack.mjs'), '--out', join(work, 'tarballs')],
    { encoding: 'utf8' },
  )
  expect(done.status, done.stderr).toBe(0)
  tarballs = JSON.parse(done.stdout)
  const manifest = spawnSync('tar', ['-xOf', tarballs.platform, 'package/package.json'], {
    encoding: 'utf8',
  }).stdout
  platform = JSON.parse(manifest).name
})

it('the main tarball holds no native file, the platform tarball nothing else', () => {
  const list = (file: string) =>
    spawnSync('tar', ['-tf', file], { encoding: 'utf8' }).stdout.trim().split('\n')
  const main = list(tarballs.main)
  expect(main.filter((f) => f.endsWith('.node'))).toEqual([])
  for (const f of [
    'package.json',
    'binding.cjs',
    'dist/index.js',
    'dist/index.cjs',
    'dist/index.d.ts',
    'dist/cli.js',
    'assets/alice.txt',
    'THIRD-PARTY.md',
  ]) {
    expect(main).toContain(`package/${f}`)
  }
  const code = list(tarballs.platform).filter((f) => !/LICENSE|\.md$/.test(f))
  expect(code.sort()).toEqual(['package/kvasir.node', 'package/package.json'])
})

it('the packed manifest has the platform packages as optional dependencies and no scripts', () => {
  const json = spawnSync('tar', ['-xOf', tarballs.main, 'package/package.json'], {
    encoding: 'utf8',
  }).stdout
  const manifest = JSON.parse(json)
  expect(Object.keys(manifest.optionalDependencies)).toHaveLength(7)
  expect(new Set(Object.values(manifest.optionalDependencies))).toEqual(new Set([manifest.version]))
  const loader = readFileSync(path('binding.cjs'), 'utf8')
  for (const name of Object.keys(manifest.optionalDependencies))
    expect(loader).toContain(`'${name}'`)
  for (const field of ['scripts', 'dependencies', 'devDependencies', 'private'])
    expect(manifest).not.toHaveProperty(field)
})

it('with the platform package, ESM and CJS resume, and the file came from that package', () => {
  const dir = install('both', tarballs.main, tarballs.platform)
  writeFileSync(join(dir, 'a.mjs'), `import ${NAMES} from 'kvasir'\n${BODY}`)
  writeFileSync(
    join(dir, 'a.cjs'),
    `const ${NAMES} = require('kvasir')\n;(async () => {${BODY}})()`,
  )
  for (const file of ['a.mjs', 'a.cjs']) {
    const run = node(dir, file)
    expect(run.stderr).toBe('')
    const out = JSON.parse(run.stdout)
    expect(out.same).toBe(true)
    expect(out.reused).toBeGreaterThan(128)
    expect(out.shared).toEqual([realpathSync(join(dir, 'node_modules', platform, 'kvasir.node'))])
  }
  const doctor = JSON.parse(
    node(dir, join(dir, 'node_modules/kvasir/dist/cli.js'), 'doctor', '--json').stdout,
  )
  expect(doctor).toMatchObject({ ok: true, native: { loaded: true, tried: [] } })
})

it('without it, the import works and the first use says what was tried', () => {
  const dir = install('alone', tarballs.main)
  const use = `openStore({ dir: 'kv' }).catch((e) => console.log(e.code, e.message))`
  writeFileSync(join(dir, 'a.mjs'), `import { openStore } from 'kvasir'\n${use}`)
  writeFileSync(join(dir, 'a.cjs'), `const { openStore } = require('kvasir')\n${use}`)
  for (const file of ['a.mjs', 'a.cjs']) {
    const run = node(dir, file)
    expect(run.stderr).toBe('')
    expect(run.stdout).toMatch(/^NativeUnavailable /)
    expect(run.stdout).toContain(`${platform}: not installed`)
  }
})
