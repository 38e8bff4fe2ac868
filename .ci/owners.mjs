// Checks the shape of the Rust build graph from `cargo metadata`:
//   1. crates of the workspace depend on each other one way only (table below, as in ARCHITECTURE.md);
//   2. a heavy dependency enters through its owner, and banned crates are absent (deny.toml, `[bans] deny`);
//   3. unsafe code is forbidden everywhere but in the three crates that need it.
// Prints every violation and exits with 1; no tool has to be installed.

import { execFileSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = join(dirname(fileURLToPath(import.meta.url)), '..')

/** Crates a crate may use; tests may use more. */
const uses = {
  core: [],
  cpu: ['core'],
  policies: ['core'],
  store: ['core'],
  model: ['core'],
  testkit: ['core'],
  engine: ['core', 'policies', 'store'],
  node: ['core', 'cpu', 'policies', 'store', 'engine', 'model'],
}
/** Crates a crate may use in its tests only. */
const testUses = {
  cpu: ['testkit'],
  policies: ['testkit'],
  store: ['testkit'],
  model: ['testkit', 'cpu'],
  engine: ['testkit', 'model', 'cpu'],
  testkit: ['cpu'],
}
const mayBeUnsafe = ['cpu', 'cuda', 'node']

const metadata = JSON.parse(
  execFileSync('cargo', ['metadata', '--format-version', '1', '--locked'], {
    cwd: root,
    maxBuffer: 1 << 28,
    encoding: 'utf8',
  }),
)
const members = new Set(metadata.workspace_members)
const byId = new Map(metadata.packages.map((p) => [p.id, p]))
const problems = []
const short = (name) => name.replace(/^kvasir-/, '')

// 1. one-way graph
for (const p of metadata.packages.filter((p) => members.has(p.id))) {
  const name = short(p.name)
  if (!(name in uses)) {
    problems.push(`${p.name}: not in the crate graph of .ci/owners.mjs`)
    continue
  }
  for (const d of p.dependencies.filter((d) => d.name.startsWith('kvasir-'))) {
    const allowed = d.kind === 'dev' ? [...uses[name], ...(testUses[name] ?? [])] : uses[name]
    if (!allowed.includes(short(d.name))) {
      problems.push(`${p.name} must not depend on ${d.name}${d.kind === 'dev' ? ' (tests)' : ''}`)
    }
  }
}

// 2. owners and bans
const rules = []
for (const line of readFileSync(join(root, 'deny.toml'), 'utf8').split('\n')) {
  const crate = /^\s*\{ crate = "([^"]+)"/.exec(line)?.[1]
  if (crate === undefined) continue
  const wrappers = /wrappers = \[([^\]]*)\]/.exec(line)?.[1]
  rules.push({ crate, owners: wrappers?.match(/[^",\s]+/g) ?? [] })
}
if (rules.length < 10) problems.push('deny.toml: the list of owners and bans could not be read')
const users = new Map()
for (const node of metadata.resolve.nodes) {
  for (const d of node.deps) {
    if (d.dep_kinds.every((k) => k.kind === 'dev') && !members.has(node.id)) continue
    const name = byId.get(d.pkg).name
    users.set(name, (users.get(name) ?? new Set()).add(byId.get(node.id).name))
  }
}
for (const { crate, owners } of rules) {
  const strangers = [...(users.get(crate) ?? [])].filter((user) => !owners.includes(user))
  if (strangers.length > 0) {
    problems.push(
      owners.length > 0
        ? `${crate} belongs to ${owners.join(', ')}, but ${strangers.join(', ')} depends on it`
        : `${crate} is banned (deny.toml), but ${strangers.join(', ')} depends on it`,
    )
  }
}

// 3. unsafe
for (const p of metadata.packages.filter((p) => members.has(p.id))) {
  if (mayBeUnsafe.includes(short(p.name))) continue
  const lib = p.targets.find((t) => t.kind.includes('lib'))
  if (!/^#!\[forbid\(unsafe_code\)\]$/m.test(readFileSync(lib.src_path, 'utf8'))) {
    problems.push(`${p.name}: ${lib.src_path} lacks #![forbid(unsafe_code)]`)
  }
}

for (const p of problems) console.error(`owners: ${p}`)
console.log(`owners: ${members.size} crates, ${rules.length} rules, ${problems.length} problems`)
process.exit(problems.length > 0 ? 1 : 0)
