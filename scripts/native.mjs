/** Builds the native file of this checkout: native/kvasir.node. Cargo decides what is stale. */

import { spawnSync } from 'node:child_process'
import { copyFileSync, existsSync, mkdirSync, readFileSync, renameSync } from 'node:fs'
import path from 'node:path'
import { pathToFileURL } from 'node:url'
import { fail, root, run, say } from './lib/repo.mjs'

/** Ends the process with advice if there is no Rust toolchain. */
export function checkCargo() {
  if (spawnSync('cargo', ['--version'], { stdio: 'ignore' }).status === 0) return
  fail(
    'cargo was not found, and the native part is built from source here. Install Rust 1.90 or newer:\n' +
      "  curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh     (https://rustup.rs)\n" +
      '  and a C compiler (Debian: apt install build-essential), then open a new shell and try again.',
  )
}

/** Builds what is stale and puts it where the loader looks. */
export function buildNative() {
  checkCargo()
  const native = path.join(root, 'native', 'kvasir.node')
  const out = path.join(root, 'target', 'napi')
  if (!existsSync(native)) say('building the native part (the first time takes some minutes)')
  const target = process.env.CARGO_BUILD_TARGET
  run(process.execPath, [
    path.join(root, 'node_modules/@napi-rs/cli/cli.mjs'),
    'build',
    ...['--release', '--no-js', '--manifest-path', 'crates/node/Cargo.toml', '--output-dir', out],
    ...(target ? ['--target', target] : []),
    ...['--', '--locked'],
  ])
  const built = path.join(out, 'kvasir.node')
  if (existsSync(native) && readFileSync(native).equals(readFileSync(built))) return
  mkdirSync(path.dirname(native), { recursive: true })
  // By rename: a process that has the old file mapped keeps it.
  const next = `${native}.${process.pid}`
  copyFileSync(built, next)
  renameSync(next, native)
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? '').href) buildNative()
