/** An engine that runs its own layers hands q, k and v to a pass and gets attention outputs back. */

import { openStore, recipe, streamingLlm } from 'kvasir'

const LAYERS = 2
const [QUERY_HEADS, KV_HEADS, DIM] = [4, 2, 16] as const

/** Stands in for the projections of a real engine: numbers that depend on layer, position and channel. */
function project(layer: number, pos: number, size: number, salt: number): Float32Array {
  return Float32Array.from({ length: size }, (_, i) => Math.sin(salt + layer * 7.3 + pos * 1.7 + i * 0.9))
}

export async function run(dir: string): Promise<{ rows: number; output: Float32Array }> {
  const store = await openStore({ dir })
  try {
    const session = await store.open({
      tenant: 'acme',
      layout: {
        fingerprint: '00'.repeat(32), // a digest of your model: rows are shared only where it is equal
        context: 4096,
        layers: LAYERS,
        queryHeads: QUERY_HEADS,
        kvHeads: KV_HEADS,
        keyDim: DIM,
        valueDim: DIM,
        rope: 'half',
        inverseFrequencies: Array.from({ length: DIM / 2 }, (_, i) => 10000 ** ((-2 * i) / DIM)),
      },
      recipe: recipe([streamingLlm({ sinks: 4, recent: 28 })]),
    })
    const output = new Float32Array(QUERY_HEADS * DIM)
    for (let pos = 0; pos < 80; pos++) {
      const pass = session.pass({ rows: 1 })
      for (let layer = 0; layer < LAYERS; layer++) {
        const q = project(layer, pos, QUERY_HEADS * DIM, 1)
        const k = project(layer, pos, KV_HEADS * DIM, 2)
        const v = project(layer, pos, KV_HEADS * DIM, 3)
        pass.attend({ layer }, q, k, v, output) // synchronous, borrowed views
      }
      await pass.end() // the only place where policies act
    }
    const held = session.report().bytesHeld / (LAYERS * KV_HEADS * 2 * DIM * 2)
    await session.close()
    return { rows: held, output }
  } finally {
    await store.close()
  }
}
