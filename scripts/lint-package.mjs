/** Checks the packed main tarball as its users meet it: publint, and "are the types wrong" for the resolvers of Node 20 and bundlers. */

import { spawnSync } from 'node:child_process'
import path from 'node:path'
import { fail, root, run } from './lib/repo.mjs'

const packed = spawnSync(process.execPath, [path.join(root, 'scripts/pack.mjs')], {
  encoding: 'utf8',
})
if (packed.status !== 0) fail(packed.stderr)
const { main } = JSON.parse(packed.stdout)
run('npx', ['--no-install', 'publint', '--strict', main])
run('npx', ['--no-install', 'attw', '--profile', 'node16', main])
