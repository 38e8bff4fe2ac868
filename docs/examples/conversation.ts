/** A conversation that survives a restart: prefill once, commit, resume, go on. */

import { Model, openStore } from 'kvasir'

export async function run(modelFile: string, dir: string): Promise<{ reused: number; text: string }> {
  const model = await Model.load(modelFile, { threads: 2 })
  const ids = await model.tokenizer.encode('Once upon a time there was a little dog. '.repeat(12))

  // Before the restart.
  const before = await openStore({ dir })
  const session = await before.open({ tenant: 'acme', model })
  await session.prefill(ids)
  await session.commit('conversation-42') // durable when this resolves
  await session.close()
  await before.close()

  // After it: nothing of the text goes through the model again.
  const store = await openStore({ dir })
  try {
    const again = await store.resume('conversation-42', { tenant: 'acme', model })
    let text = ''
    for await (const token of again.generate({ maxTokens: 24 })) text += token.text
    const reused = again.opened?.reused ?? 0
    await again.close()
    return { reused, text }
  } finally {
    await store.close()
    await model.close()
  }
}
