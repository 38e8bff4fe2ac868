/**
 * Writes what follows from the registry: ts/policies/index.ts and docs/policies/*.md.
 *
 *   node scripts/generate.mjs                 from the native file of this checkout
 *   node scripts/generate.mjs --check         fails if a file differs (CI)
 *   node scripts/generate.mjs --from FILE     from the output of `kvasir methods --json`
 */

import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import path from 'node:path'
import { parseArgs } from 'node:util'
import { root } from './lib/repo.mjs'

const { values } = parseArgs({ options: { check: { type: 'boolean' }, from: { type: 'string' } } })

function registry() {
  if (values.from) return JSON.parse(readFileSync(values.from, 'utf8'))
  const { binding, tried } = createRequire(import.meta.url)('../binding.cjs').load()
  if (!binding)
    throw new Error(
      `no native file: run \`npm run build:native\` first (${tried.map((t) => `${t.path}: ${t.why}`).join('; ')})`,
    )
  return JSON.parse(binding.methods())
}

const camel = (slug) => slug.replace(/-(.)/g, (_, c) => c.toUpperCase())
const pascal = (slug) => camel(slug).replace(/^./, (c) => c.toUpperCase())

function tsType(type) {
  const choice = /^enum\((.*)\)$/.exec(type)
  if (choice)
    return choice[1]
      .split('|')
      .map((c) => `'${c}'`)
      .join(' | ')
  const known = {
    u32: 'number',
    f32: 'number',
    bool: 'boolean',
    string: 'string',
    'u32[]': 'readonly number[]',
    budget: 'Budget',
  }
  if (!known[type])
    throw new Error(`option type ${type} has no TypeScript form: add it to scripts/generate.mjs`)
  return known[type]
}

/** Words into comment lines of at most 110 columns. */
function comment(indent, text) {
  const lines = ['']
  for (const word of text.replaceAll('*/', '* /').split(/\s+/)) {
    const last = lines[lines.length - 1]
    if (last && last.length + word.length + 1 > 110 - indent.length) lines.push(word)
    else lines[lines.length - 1] = last ? `${last} ${word}` : word
  }
  if (lines.length === 1) return `${indent}/** ${lines[0]} */\n`
  return `${indent}/**\n${lines.map((l) => `${indent} * ${l}\n`).join('')}${indent} */\n`
}

function factories(methods) {
  const budget = methods.some((m) => m.options.some((o) => o.type === 'budget'))
  let out = `/** Factories of every method, generated from the registry by scripts/generate.mjs. Do not edit. */\n\n`
  out += `import { type PolicyOptions, type Step, step } from '../recipe.js'\n`
  if (budget)
    out += `\n/** Rows kept per kv head, as a count or as a share of the rows seen, in (0, 1]. */\nexport type Budget = { readonly rows: number } | { readonly ratio: number }\n`
  for (const m of methods) {
    const type = `${pascal(m.slug)}Options`
    out += `\n/** Options of \`${camel(m.slug)}\`. */\nexport interface ${type} extends PolicyOptions {\n`
    for (const o of m.options) {
      out += comment('  ', `${o.doc} Default: \`${JSON.stringify(o.default)}\`.`)
      out += `  readonly ${o.name}?: ${tsType(o.type)}\n`
    }
    out += `}\n\n${comment('', `${m.summary} ${m.paper}`)}`
    out += `export function ${camel(m.slug)}(options: ${type} = {}): Step {\n  return step('${m.slug}', options)\n}\n`
  }
  return out
}

function page(m) {
  let out = `<!-- Generated from the registry by scripts/generate.mjs. Do not edit. -->\n\n# ${m.slug}\n\n${m.summary}\n\n`
  out += `${m.paper}\n\n| group | leaf | track |\n|---|---|---|\n| ${m.group} | ${m.leaf} | ${m.track} |\n\n`
  out += `\`\`\`ts\nimport { ${camel(m.slug)}, recipe } from 'kvasir'\n\nrecipe([${camel(m.slug)}()])\n\`\`\`\n\n`
  if (m.options.length === 0) return `${out}No options.\n`
  out += `| option | type | default | meaning |\n|---|---|---|---|\n`
  for (const o of m.options) {
    out += `| \`${o.name}\` | ${o.type.replaceAll('|', '\\|')} | \`${JSON.stringify(o.default)}\` | ${o.doc.replaceAll('|', '\\|')} |\n`
  }
  return out
}

const methods = registry()
const files = new Map([['ts/policies/index.ts', factories(methods)]])
for (const m of methods) files.set(`docs/policies/${m.slug}.md`, page(m))

const pages = path.join(root, 'docs/policies')
const stale = (existsSync(pages) ? readdirSync(pages) : [])
  .map((f) => `docs/policies/${f}`)
  .filter((f) => f.endsWith('.md') && !files.has(f))

if (values.check) {
  const read = (f) =>
    existsSync(path.join(root, f)) ? readFileSync(path.join(root, f), 'utf8') : null
  const drift = [...[...files].filter(([f, text]) => read(f) !== text).map(([f]) => f), ...stale]
  if (drift.length > 0) {
    console.error(
      `generated files differ from the registry: ${drift.join(', ')}. Run \`npm run generate\`.`,
    )
    process.exit(1)
  }
} else {
  for (const [f, text] of files) {
    mkdirSync(path.dirname(path.join(root, f)), { recursive: true })
    writeFileSync(path.join(root, f), text)
  }
  for (const f of stale) rmSync(path.join(root, f))
}
