/** The thousandth user of a system prompt: its rows are found while their first owner still runs. */

import { Model, openStore, type Report } from 'kvasir'

export async function run(modelFile: string, dir: string): Promise<{ first: Report; second: Report; stranger: Report }> {
  const model = await Model.load(modelFile, { threads: 2 })
  const store = await openStore({ dir, hostBytes: 64e6 })
  try {
    const system = 'You tell short and friendly stories about animals that live near the park. '.repeat(8)
    const ask = async (tenant: string, question: string): Promise<Report> => {
      const session = await store.open({ tenant, model })
      return session.prefill(await model.tokenizer.encode(system + question))
    }
    return {
      first: await ask('acme', 'Tell one about a cat.'),
      second: await ask('acme', 'Tell one about two birds.'), // the prompt is reused, block by block
      stranger: await ask('rival', 'Tell one about a cat.'), // another tenant finds nothing
    }
  } finally {
    await store.close()
    await model.close()
  }
}
