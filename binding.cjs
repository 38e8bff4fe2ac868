/**
 * Finds and loads the native file, for the ESM and the CJS build alike.
 *
 * Order: KVASIR_NATIVE_PATH (then nothing else is tried); the platform package; native/kvasir.node, but only inside
 * a checkout of the repository, so that a stray local file can never shadow the installed package.
 * Loading is lazy and never throws: the caller gets the binding, or the list of what was tried and why each failed.
 */
'use strict'

const { existsSync } = require('node:fs')
const path = require('node:path')
const { version } = require('./package.json')

/** Platforms with a prebuilt package, by `platform-arch[-libc]`. */
const PACKAGES = {
  'linux-x64-gnu': 'kvasir-linux-x64-gnu',
  'linux-x64-musl': 'kvasir-linux-x64-musl',
  'linux-arm64-gnu': 'kvasir-linux-arm64-gnu',
  'linux-arm64-musl': 'kvasir-linux-arm64-musl',
  'darwin-arm64': 'kvasir-darwin-arm64',
  'darwin-x64': 'kvasir-darwin-x64',
  'win32-x64': 'kvasir-win32-x64-msvc',
}

/** `platform-arch`, and the C library where it matters. */
function platformKey() {
  const key = `${process.platform}-${process.arch}`
  if (process.platform !== 'linux') return key
  const before = process.report.excludeNetwork
  process.report.excludeNetwork = true // else the report may wait for name servers
  const { header } = process.report.getReport()
  process.report.excludeNetwork = before
  return `${key}-${header.glibcVersionRuntime ? 'gnu' : 'musl'}`
}

function attempt(tried, from, missing, resolve) {
  let file = from
  try {
    file = resolve()
    const binding = require(file)
    const got = binding.version()
    if (got !== version) throw new Error(`its version is ${got}, this package is ${version}`)
    return { binding, path: file }
  } catch (error) {
    const lines = String(error?.message ?? error).split('\n')
    tried.push({ path: file, why: error?.code === 'MODULE_NOT_FOUND' ? missing : lines[0] })
    return null
  }
}

let result

function load() {
  if (result) return result
  const tried = []
  const key = platformKey()
  const local = path.join(__dirname, 'native', 'kvasir.node')
  const override = process.env.KVASIR_NATIVE_PATH
  let found = null
  if (override) {
    found = attempt(tried, override, 'no such file', () => path.resolve(override))
  } else {
    const name = PACKAGES[key]
    if (name) {
      found = attempt(tried, name, 'not installed', () => require.resolve(`${name}/kvasir.node`))
    } else {
      tried.push({ path: key, why: 'no package is built for this platform' })
    }
    if (!found && existsSync(path.join(__dirname, 'crates', 'node', 'Cargo.toml'))) {
      found = attempt(tried, local, 'not built (npm run build:native)', () => local)
    }
  }
  result = {
    binding: found?.binding ?? null,
    path: found?.path ?? null,
    platform: key,
    tried,
    version,
  }
  return result
}

module.exports = { load, PACKAGES }
