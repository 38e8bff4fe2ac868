/** Greedy text of trained models, id for id, against float64 references. */

import { describe, expect, inject, it } from 'vitest'
import { Model, openStore, type Session } from '../ts/index.js'
import { json, TINY, TINY_HF } from './data.js'
import { tempDir } from './temp.js'

interface Greedy {
  prompt: string
  prompt_ids: number[]
  greedy_ids: number[]
  text: string
  first_step_top5: [number, number][]
  first_step_logsumexp: number
}

async function greedy(
  session: Session,
  maxTokens: number,
): Promise<{ ids: number[]; text: string }> {
  const ids: number[] = []
  let text = ''
  for await (const token of session.generate({ maxTokens, stopIds: [] })) {
    if (token.id !== null) ids.push(token.id)
    text += token.text
  }
  return { ids, text }
}

/** Runs a golden path with f32 rows, as the references did. */
async function follow(model: Model, g: Greedy): Promise<void> {
  const store = await openStore({ dir: tempDir() })
  const session = await store.open({ tenant: 't', model, kv: 'f32' })
  const report = await session.prefill(g.prompt_ids)
  expect(report).toMatchObject({ reused: 0, computed: g.prompt_ids.length })
  const logits = session.logits()
  for (const [id, logit] of g.first_step_top5) expect(logits[id]).toBeCloseTo(logit, 2)
  let sum = 0
  for (const x of logits) sum += Math.exp(x - g.first_step_logsumexp)
  expect(sum).toBeCloseTo(1, 2)
  const { ids, text } = await greedy(session, g.greedy_ids.length)
  expect(ids).toEqual(g.greedy_ids)
  expect([...session.ids]).toEqual([...g.prompt_ids, ...ids])
  expect(text).toBe(model.tokenizer.decode(ids, { continues: true }))
  await session.close()
  await store.close()
}

describe.each([
  ['GGUF', TINY],
  ['Hugging Face folder', TINY_HF],
])('stories260K from a %s', (_, file) => {
  it('continues every golden prompt as measured', async () => {
    const model = await Model.load(file)
    for (const g of json<Greedy[]>('testdata/golden/stories260K.greedy.json')) {
      expect([...(await model.tokenizer.encode(g.prompt))]).toEqual(g.prompt_ids)
      await follow(model, g)
    }
    await model.close()
  })
})

const smollm = inject('smollm')
describe.runIf(smollm)('SmolLM2-135M-Instruct', () => {
  it('continues every golden prompt as measured', async () => {
    const model = await Model.load(smollm as string)
    for (const g of json<{ greedy: Greedy[] }>('testdata/smollm2/golden.json').greedy)
      await follow(model, g)
    await model.close()
  })

  it('renders the chat of its template', async () => {
    const model = await Model.load(smollm as string)
    const { tokenization } = json<{ tokenization: { text: string; ids: number[] }[] }>(
      'testdata/smollm2/golden.json',
    )
    const chat = tokenization.find((t) => t.text.startsWith('<|im_start|>'))
    const text = model.chat?.render([{ role: 'user', content: 'What is the capital of France?' }])
    expect(text).toBe(chat?.text)
    expect([...(await model.tokenizer.encode(text as string, { special: true }))]).toEqual(
      chat?.ids,
    )
    await model.close()
  })
})
