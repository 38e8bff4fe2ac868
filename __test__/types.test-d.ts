/** The types a user meets. Checked by `tsc`, never run. */

import { expectTypeOf, test } from 'vitest'
import {
  CacheError,
  type Generation,
  int8,
  Model,
  openStore,
  type Recipe,
  type Report,
  recipe,
  type Session,
  type Step,
} from '../ts/index.js'

test('the main job', async () => {
  await using store = await openStore({ dir: './kv', hostBytes: 4e9 })
  const model = await Model.load('model.gguf', { threads: 2 })
  await using session = await store.open({ tenant: 'acme', model, recipe: recipe([int8()]) })
  expectTypeOf(session).toEqualTypeOf<Session>()
  expectTypeOf(await session.prefill(new Uint32Array([1]))).toEqualTypeOf<Report>()
  expectTypeOf(session.generate({ maxTokens: 4 })).toEqualTypeOf<Generation>()
  for await (const token of session.generate()) {
    expectTypeOf(token.text).toEqualTypeOf<string>()
    expectTypeOf(token.id).toEqualTypeOf<number | null>()
  }
  expectTypeOf(session.opened).toEqualTypeOf<Report | null>()
  expectTypeOf(await session.fork()).toEqualTypeOf<Session>()
})

test('recipes', () => {
  expectTypeOf(int8({ sinkRows: 4, floor: 0.01 })).toEqualTypeOf<Step>()
  expectTypeOf(recipe([int8(), { use: 'int8' }])).toEqualTypeOf<Recipe>()
  // @ts-expect-error a misspelt option
  int8({ sinkRow: 4 })
  // @ts-expect-error a step needs the slug of a method
  recipe([{ sinkRows: 4 }])
})

test('misuse', async () => {
  // @ts-expect-error there is no default tenant
  openStore({ dir: 'x' }).then((s) => s.open({ model: {} as Model }))
  // @ts-expect-error the constructor is private: use Model.load
  new Model('x')
  expectTypeOf(new CacheError('Busy', 'x').code).toExtend<string>()
})
