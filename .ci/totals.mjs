// Adds the totals of cargo test and vitest out of a log: node totals.mjs LOG STATUS. The last line is the verdict of the run.

import { readFileSync } from 'node:fs'
import { stripVTControlCharacters } from 'node:util'

const [log, status] = process.argv.slice(2)
const text = stripVTControlCharacters(readFileSync(log, 'utf8'))
const total = { passed: 0, failed: 0, skipped: 0 }
const parts = []

function add(what, { passed = 0, failed = 0, skipped = 0 }) {
  total.passed += passed
  total.failed += failed
  total.skipped += skipped
  parts.push(`${what} ${passed} passed, ${failed} failed, ${skipped} skipped`)
}

const cargo = { passed: 0, failed: 0, skipped: 0 }
for (const m of text.matchAll(/^test result: \w+\. (\d+) passed; (\d+) failed; (\d+) ignored/gm)) {
  cargo.passed += Number(m[1])
  cargo.failed += Number(m[2])
  cargo.skipped += Number(m[3])
}
add('cargo', cargo)

// "      Tests  1 failed | 40 passed | 2 skipped (43)"
const vitest = { passed: 0, failed: 0, skipped: 0 }
for (const m of text.matchAll(/^\s*Tests\s+(.*)\(\d+\)\s*$/gm)) {
  for (const [, n, word] of m[1].matchAll(/(\d+) (passed|failed|skipped|todo)/g)) {
    vitest[word === 'todo' ? 'skipped' : word] += Number(n)
  }
}
add('vitest', vitest)

// What a test says it could not run here (no device, no such instruction set), one line each.
const notRun = [...text.matchAll(/^not run: .*$/gm)].map((m) => m[0])
for (const line of new Set(notRun)) console.log(line)
console.log(`\n${parts.join('; ')}`)
if (Number(status) === 0 && (cargo.passed === 0 || vitest.passed === 0)) {
  console.log('one of the two suites did not run')
  total.failed += 1
  process.exitCode = 1
}
if (Number(status) !== 0 && total.failed === 0) total.failed = 1
console.log(`${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped`)
