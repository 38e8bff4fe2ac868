/**
 * Everything that `npm start` and `npm test` need, from a fresh clone on: packages, the native part, the TypeScript build, the
 * real model. Each step does only what is stale.
 */

import { createHash } from 'node:crypto'
import { existsSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import path from 'node:path'
import { pathToFileURL } from 'node:url'
import { fetchModel } from './lib/model.mjs'
import { fail, root, run, say, stage } from './lib/repo.mjs'
import { buildNative, checkCargo } from './native.mjs'

/** Returns the model: `{ path }`, or `{ missing }` with the reason. */
export async function setup() {
  const [major, minor] = process.versions.node.split('.').map(Number)
  if (major < 20 || (major === 20 && minor < 19))
    fail(`Node 20.19 or newer is needed, this is ${process.version}`)
  checkCargo()
  await stage('packages', installPackages)
  await stage('native', buildNative)
  await stage('typescript', buildTypeScript)
  return stage('model', () => fetchModel(say))
}

function installPackages() {
  const stamp = path.join(root, 'node_modules', '.kvasir-lock')
  const lock = createHash('sha256')
    .update(readFileSync(path.join(root, 'package-lock.json')))
    .digest('hex')
  if (existsSync(stamp) && readFileSync(stamp, 'utf8') === lock) return
  say('installing packages')
  run('npm', ['ci', '--no-audit', '--no-fund', '--loglevel=error'])
  writeFileSync(stamp, lock)
}

function buildTypeScript() {
  const sources = [
    'ts',
    'package.json',
    'tsconfig.json',
    'tsup.config.ts',
    'node_modules/.kvasir-lock',
  ]
  const built = path.join(root, 'dist', '.built')
  if (
    existsSync(built) &&
    statSync(built).mtimeMs >= Math.max(...sources.map((s) => newest(path.join(root, s))))
  )
    return
  say('building the TypeScript part')
  rmSync(path.join(root, 'dist'), { recursive: true, force: true })
  run(process.execPath, [path.join(root, 'node_modules/tsup/dist/cli-default.js'), '--silent'])
  writeFileSync(built, '')
}

function newest(file) {
  const stat = statSync(file)
  if (!stat.isDirectory()) return stat.mtimeMs
  return Math.max(stat.mtimeMs, ...readdirSync(file).map((f) => newest(path.join(file, f))))
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) {
  const model = await setup()
  if (model.missing) say(`the real model is not here: ${model.missing}`)
}
