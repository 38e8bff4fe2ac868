/** The examples of the documentation, run as they are. */

import { describe, expect, test } from 'vitest'
import { run as conversation } from '../docs/examples/conversation.js'
import { run as engineBuilder } from '../docs/examples/engine-builder.js'
import { run as systemPrompt } from '../docs/examples/system-prompt.js'
import { TINY } from './data.js'
import { tempDir as temp } from './temp.js'

describe('docs/examples', () => {
  test('conversation.ts resumes everything and goes on', async () => {
    const { reused, text } = await conversation(TINY, temp())
    expect(reused).toBeGreaterThan(100)
    expect(text.length).toBeGreaterThan(10)
  })

  test('system-prompt.ts reuses the prompt inside a tenant only', async () => {
    const { first, second, stranger } = await systemPrompt(TINY, temp())
    expect(first.reused).toBe(0)
    expect(second.reused).toBeGreaterThan(second.computed)
    expect(second.reused % 64).toBe(0)
    expect(stranger.reused).toBe(0)
  })

  test('engine-builder.ts stays inside the budget of its policy', async () => {
    const { rows, output } = await engineBuilder(temp())
    expect(rows).toBe(32)
    expect(output.every(Number.isFinite)).toBe(true)
    expect(output.some((x) => x !== 0)).toBe(true)
  })
})
