/**
 * Packs what is published: the main package and platform packages, as tarballs in one folder.
 *
 *   node scripts/pack.mjs [--out DIR] [--native FILE --platform NAME]
 *
 * Without --native, native/kvasir.node is packed for this machine's platform. The release workflow calls it once per target.
 * The main package is staged first: the packed package.json has the platform packages as optional dependencies (which the root
 * file cannot have before they are published, see npm/README.md) and neither scripts nor development dependencies.
 */

import { spawnSync } from 'node:child_process'
import {
  cpSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { createRequire } from 'node:module'
import path from 'node:path'
import { parseArgs } from 'node:util'
import { fail, root } from './lib/repo.mjs'

const { values } = parseArgs({
  options: {
    out: { type: 'string' },
    native: { type: 'string' },
    platform: { type: 'string' },
  },
})
const out = path.resolve(values.out ?? path.join(root, '.cache', 'pack'))
const staging = path.join(out, 'staging')
const manifest = JSON.parse(readFileSync(path.join(root, 'package.json'), 'utf8'))
const platforms = readdirSync(path.join(root, 'npm')).filter((d) =>
  existsSync(path.join(root, 'npm', d, 'package.json')),
)
const platformManifest = (d) =>
  JSON.parse(readFileSync(path.join(root, 'npm', d, 'package.json'), 'utf8'))

rmSync(staging, { recursive: true, force: true })
const tarballs = { main: packMain(), platform: packPlatform() }
rmSync(staging, { recursive: true, force: true })
process.stdout.write(`${JSON.stringify(tarballs, null, 2)}\n`)

function packMain() {
  if (!existsSync(path.join(root, 'dist', 'index.js')))
    fail('dist is not built: run `npm run setup` first')
  const { private: _private, scripts: _scripts, devDependencies: _dev, ...rest } = manifest
  const optionalDependencies = Object.fromEntries(
    platforms.map((d) => [platformManifest(d).name, manifest.version]),
  )
  const files = [...manifest.files, 'binding.d.cts']
  const dir = stage('main', { ...rest, files, optionalDependencies })
  for (const f of files) {
    const from = path.join(root, f)
    // Documents that are not written yet must not stop the packaging test; code must be there.
    if (!existsSync(from)) {
      if (/\.md$|^LICENSE/.test(f)) continue
      fail(`${f} is missing`)
    }
    cpSync(from, path.join(dir, f), {
      recursive: true,
      filter: (s) => !s.endsWith('.node') && !s.endsWith('.built'),
    })
  }
  return pack(dir)
}

function packPlatform() {
  const key = values.platform ?? createRequire(import.meta.url)('../binding.cjs').load().platform
  const name = { 'win32-x64': 'win32-x64-msvc' }[key] ?? key
  if (!platforms.includes(name))
    fail(`no platform package is called ${name}; there are ${platforms.join(', ')}`)
  const native = path.resolve(values.native ?? path.join(root, 'native', 'kvasir.node'))
  if (!existsSync(native)) fail(`${native} is missing: run \`npm run build:native\` first`)
  const dir = stage(name, { ...platformManifest(name), version: manifest.version })
  cpSync(native, path.join(dir, 'kvasir.node'))
  for (const f of ['LICENSE-MIT', 'LICENSE-APACHE'])
    if (existsSync(path.join(root, f))) cpSync(path.join(root, f), path.join(dir, f))
  return pack(dir)
}

function stage(name, json) {
  const dir = path.join(staging, name)
  mkdirSync(dir, { recursive: true })
  writeFileSync(path.join(dir, 'package.json'), `${JSON.stringify(json, null, 2)}\n`)
  return dir
}

function pack(dir) {
  const done = spawnSync('npm', ['pack', '--json', '--pack-destination', out], {
    cwd: dir,
    encoding: 'utf8',
    shell: process.platform === 'win32',
  })
  if (done.status !== 0) fail(`npm pack failed in ${dir}:\n${done.stderr}`)
  const report = Object.values(JSON.parse(done.stdout))[0]
  return path.join(out, report.filename)
}
